// Pictures of 28x28 numbers, and the two charts.

const SIZE = 28;
const NEGATIVE = [74, 163, 255];
const POSITIVE = [255, 154, 61];
const OUTSIDE = [255, 95, 162];
const NOISE_RANGE = 3;

/** An image: -1 is black, 1 is white. What lies far outside is tinted where outside is true. */
export function paintImage(canvas, values, { outside = false } = {}) {
  paint(canvas, values, (value, data, at) => {
    const grey = Math.min(Math.max(value, -1), 1) * 127.5 + 127.5;
    const share = outside ? Math.min(Math.max(Math.abs(value) - 1.1, 0), 1) : 0;
    for (let c = 0; c < 3; c++) data[at + c] = grey + share * (OUTSIDE[c] - grey);
  });
}

/** A noise: 0 is black, negative numbers are blue, positive ones orange. */
export function paintNoise(canvas, values, range = NOISE_RANGE) {
  paint(canvas, values, (value, data, at) => {
    const share = Math.min(Math.abs(value) / range, 1);
    const full = value < 0 ? NEGATIVE : POSITIVE;
    for (let c = 0; c < 3; c++) data[at + c] = share * full[c];
  });
}

/** colour writes red, green and blue of a value into data, which rounds. */
function paint(canvas, values, colour) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(SIZE, SIZE);
  for (let i = 0; i < values.length; i++) {
    colour(values[i], image.data, 4 * i);
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

export function element(tag, properties = {}, html = "") {
  const made = document.createElement(tag);
  made.innerHTML = html;
  return Object.assign(made, properties);
}

/** A canvas in a frame with a caption below. */
export class Picture {
  constructor(parent, caption = "", label = "") {
    this.canvas = element("canvas", { width: SIZE, height: SIZE });
    this.canvas.setAttribute("role", "img");
    this.frame = element("div", { className: "frame" });
    this.frame.append(this.canvas);
    this.caption = element("figcaption", {}, caption);
    this.figure = element("figure");
    this.figure.append(this.frame);
    if (caption) this.figure.append(this.caption);
    parent.append(this.figure);
    this.describe(label);
  }

  describe(label) {
    this.canvas.setAttribute("aria-label", label);
  }

  image(values, options) {
    paintImage(this.canvas, values, options);
  }

  noise(values, range) {
    paintNoise(this.canvas, values, range);
  }
}

/** A curve through points (x, y) in a square from (0, 0), below on the left, to (1, 1). */
const path = (points) =>
  points.map(([x, y], i) => `${i ? "L" : "M"}${(100 * x).toFixed(2)} ${(100 - 100 * y).toFixed(2)}`);

const svg = (content) =>
  `<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">${content}</svg>`;

const tag = (html, style) => `<span class="tag" style="${style}">${html}</span>`;

/** How much of the image and of the noise is left at each t; where the steps are. */
export function drawSchedule(parent, alphaBar, times, names) {
  const T = alphaBar.length - 1;
  const x = (time) => 1 - time / T;
  const every = Array.from({ length: 101 }, (_, i) => Math.round((i * T) / 100));
  const curve = (height) => path(every.map((time) => [x(time), height(alphaBar[time])])).join("");
  const mark = (time) => `<line x1="${100 * x(time)}" x2="${100 * x(time)}" y1="86" y2="100"/>`;
  parent.innerHTML =
    svg(
      times.map(mark).join("") +
        `<path class="signal" d="${curve((a) => Math.sqrt(a))}"/>` +
        `<path class="noise" d="${curve((a) => Math.sqrt(1 - a))}"/>`,
    ) +
    tag(names.noise, "left: 0; top: 8px") +
    tag(names.signal, "left: 0; bottom: 20px") +
    tag(`t = ${T}, noise`, "left: 0; top: 100%") +
    tag("t = 0, image", "right: 0; top: 100%") +
    `<span class="now"></span>`;
}

/** Marks the step from t in the schedule. */
export function markTime(parent, t, T) {
  parent.querySelector(".now").style.left = `${100 * (1 - t / T)}%`;
}

/** The loss at the times measured so far, on a logarithmic axis from 0.0001 to 1. */
export function drawLosses(parent, losses, current, T) {
  const height = (loss) => Math.min(Math.max(1 + Math.log10(loss) / 4, 0), 1);
  const points = [...losses].sort(([a], [b]) => a - b).map(([t, loss]) => [t / T, height(loss)]);
  const grid = [1 / 4, 1 / 2, 3 / 4].map((y) => path([[0, y], [1, y]]).join("")).join("");
  const at = [current / T, height(losses.get(current) ?? 1)];
  parent.innerHTML =
    svg(`<path d="${grid}"/><path class="measured" d="${path(points).join("")}"/>`) +
    ["1", "0.1", "0.01", "0.001"].map((text, i) => tag(text, `left: 0; top: ${25 * i}%`)).join("") +
    tag("loss", "right: 0; top: 0") +
    tag("t = 1, hardly any noise", "left: 0; top: 100%") +
    tag(`t = ${T}`, "right: 0; top: 100%") +
    `<span class="dot" style="left: ${100 * at[0]}%; top: ${100 - 100 * at[1]}%"></span>`;
}
