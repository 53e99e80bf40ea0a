// A drawing becomes an image like those of MNIST: the digit is scaled so that its longer side has
// 20 pixels, and its centre of mass is put into the centre of 28x28 pixels [LeCun et al. 1998].

export const SIZE_OF_IMAGE = 28;
const BOX = 20;
const SAMPLES = 4; // in each direction, for each pixel

/** ink (size * size numbers in [0, 1]) -> 784 numbers in [-1, 1], or null without ink. */
export function centred(ink, size) {
  const box = boundingBox(ink, size);
  if (box === null) return null;
  const scale = BOX / Math.max(box.right - box.left, box.bottom - box.top);
  const mass = centreOfMass(ink, size);
  const middle = SIZE_OF_IMAGE / 2;
  return Float32Array.from({ length: SIZE_OF_IMAGE ** 2 }, (_, i) => {
    const [row, column] = [Math.floor(i / SIZE_OF_IMAGE), i % SIZE_OF_IMAGE];
    let sum = 0;
    for (let k = 0; k < SAMPLES ** 2; k++) {
      const y = row + (Math.floor(k / SAMPLES) + 0.5) / SAMPLES;
      const x = column + ((k % SAMPLES) + 0.5) / SAMPLES;
      const from = [mass.y + (y - middle) / scale, mass.x + (x - middle) / scale];
      sum += inkAt(ink, size, ...from);
    }
    return (2 * sum) / SAMPLES ** 2 - 1;
  });
}

function inkAt(ink, size, y, x) {
  const [row, column] = [Math.floor(y), Math.floor(x)];
  const inside = row >= 0 && column >= 0 && row < size && column < size;
  return inside ? ink[row * size + column] : 0;
}

function boundingBox(ink, size) {
  const box = { left: size, top: size, right: 0, bottom: 0 };
  ink.forEach((value, i) => {
    if (value < 0.1) return;
    const [y, x] = [Math.floor(i / size), i % size];
    box.left = Math.min(box.left, x);
    box.right = Math.max(box.right, x + 1);
    box.top = Math.min(box.top, y);
    box.bottom = Math.max(box.bottom, y + 1);
  });
  return box.right > box.left ? box : null;
}

/** In pixels from the upper left corner; the middle of the first pixel is at 0.5. */
function centreOfMass(ink, size) {
  let [total, x, y] = [0, 0, 0];
  ink.forEach((value, i) => {
    total += value;
    x += value * ((i % size) + 0.5);
    y += value * (Math.floor(i / size) + 0.5);
  });
  return { x: x / total, y: y / total };
}
