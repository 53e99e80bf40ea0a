// The convolution, which takes nearly all the time of the network, twice: in plain JavaScript, to
// read and as a fallback, and in WebAssembly with 4 numbers at a time, assembled here when the page
// opens. (A module compiled elsewhere would be a binary file in the repository.)
//
// Images lie in memory pixel by pixel, the channels of a pixel side by side. Then the inputs of one
// output pixel of a 3x3 convolution are three runs of 3 * channels numbers, one in each row.

export const PIXELS = 7; // output pixels at a time: the widths are 28, 14 and 7
const LANES = 4; // output channels at a time

/** Rounded up to a whole number of lanes. */
export const padded = (channels) => Math.ceil(channels / LANES) * LANES;

// The arguments of a convolution. Places and distances count bytes.
const ARGUMENTS = [
  "input", // place of the first input number of the first output pixel
  "weight", // [channels / 4][runs][length][4]
  "bias", // [channels]
  "output",
  "rows", // rows of the output
  "blocks", // blocks of 7 pixels in a row of the output
  "groups", // groups of 4 channels of the output
  "runs", // runs of inputs of one output pixel: 3 for a 3x3 kernel
  "length", // bytes of a run
  "runStep", // distances: between the runs of one pixel,
  "inRow", // between the inputs of two rows of the output,
  "outRow", // between the rows
  "outPixel", // and the pixels of the output
];

/** The convolution in plain JavaScript, on the memory's numbers. */
export function plainConvolution(numbers, inPixel) {
  return (input, weight, bias, output, rows, blocks, groups, runs, length, ...steps) => {
    const [runStep, inRow, outRow, outPixel] = steps.map((bytes) => bytes / 4);
    const size = length / 4;
    for (let y = 0; y < rows; y++) {
      for (let x = 0; x < blocks * PIXELS; x++) {
        const from = input / 4 + y * inRow + (x * inPixel) / 4;
        const to = output / 4 + y * outRow + x * outPixel;
        for (let group = 0, w = weight / 4; group < groups; group++) {
          let [a, b, c, d] = numbers.subarray(bias / 4 + 4 * group, bias / 4 + 4 * group + 4);
          for (let run = 0; run < runs; run++) {
            const start = from + run * runStep;
            for (let i = start; i < start + size; i++, w += 4) {
              const value = numbers[i];
              a += value * numbers[w];
              b += value * numbers[w + 1];
              c += value * numbers[w + 2];
              d += value * numbers[w + 3];
            }
          }
          numbers.set([a, b, c, d], to + 4 * group);
        }
      }
    }
  };
}

/** The same in WebAssembly's text: 7 pixels by 4 channels in registers. */
function convolution(inPixel) {
  const pixels = (line) => Array.from({ length: PIXELS }, (_, j) => line(j)).join("\n");
  const add = (name, by) => `local.get ${name} ${by} i32.add local.set ${name}`;
  const repeat = (counter, body) => `
    loop ${body}
      local.get ${counter} i32.const 1 i32.sub local.tee ${counter} br_if 0
    end`;
  const products = `
    loop
      local.get w v128.load 0 local.set weights
      ${pixels((j) => `
        local.get p v128.load32_splat ${j * inPixel} local.get weights f32x4.mul
        local.get sum${j} f32x4.add local.set sum${j}`)}
      ${add("w", "i32.const 16")}
      local.get p i32.const 4 i32.add local.tee p local.get end i32.ne br_if 0
    end`;
  const group = `
    local.get b v128.load 0 local.set weights
    ${pixels((j) => `local.get weights local.set sum${j}`)}
    local.get from local.set start
    local.get runs local.set run
    ${repeat("run", `
      local.get start local.tee p local.get length i32.add local.set end
      ${products}
      ${add("start", "local.get runStep")}`)}
    local.get to local.set p
    ${pixels((j) => `
      local.get p local.get sum${j} v128.store 0
      ${add("p", "local.get outPixel")}`)}
    ${add("b", "i32.const 16")}
    ${add("to", "i32.const 16")}`;
  return repeat("rows", `
    local.get input local.set from
    local.get output local.set block
    local.get blocks local.set x
    ${repeat("x", `
      local.get weight local.set w
      local.get bias local.set b
      local.get block local.set to
      local.get groups local.set g
      ${repeat("g", group)}
      ${add("from", `i32.const ${PIXELS * inPixel}`)}
      local.get block local.get outPixel i32.const ${PIXELS} i32.mul i32.add local.set block`)}
    ${add("input", "local.get inRow")}
    ${add("output", "local.get outRow")}`);
}

const INTEGERS = "from block to x g b w run start p end".split(" ");
const VECTORS = ["weights", ...Array.from({ length: PIXELS }, (_, j) => `sum${j}`)];
const LOCALS = [...ARGUMENTS, ...INTEGERS, ...VECTORS];
const I32 = 0x7f;
const V128 = 0x7b;

// Each instruction's bytes, and what follows them: a local, a number, a place in memory.
const INSTRUCTIONS = {
  loop: [[0x03, 0x40]],
  end: [[0x0b]],
  br_if: [[0x0d], "number"],
  "local.get": [[0x20], "local"],
  "local.set": [[0x21], "local"],
  "local.tee": [[0x22], "local"],
  "i32.const": [[0x41], "number"],
  "i32.ne": [[0x47]],
  "i32.add": [[0x6a]],
  "i32.sub": [[0x6b]],
  "i32.mul": [[0x6c]],
  "v128.load": [[0xfd, 0x00, 4], "offset"],
  "v128.load32_splat": [[0xfd, 0x09, 2], "offset"],
  "v128.store": [[0xfd, 0x0b, 4], "offset"],
  "f32x4.add": [[0xfd, 0xe4, 0x01]],
  "f32x4.mul": [[0xfd, 0xe6, 0x01]],
};

/** An integer in WebAssembly's LEB128: 7 bits a byte; signed ones keep a bit for the sign. */
function leb(value, signed = false) {
  const bytes = [];
  for (let rest = value; ; rest >>= 7) {
    const last = signed ? rest < 64 : rest < 128;
    bytes.push((rest & 127) | (last ? 0 : 128));
    if (last) return bytes;
  }
}

function assemble(text) {
  const words = text.trim().split(/\s+/);
  const bytes = [];
  while (words.length) {
    const [code, operand] = INSTRUCTIONS[words.shift()];
    bytes.push(...code);
    if (operand === "local") bytes.push(...leb(LOCALS.indexOf(words.shift())));
    if (operand === "number") bytes.push(...leb(Number(words.shift()), true));
    if (operand === "offset") bytes.push(...leb(Number(words.shift())));
  }
  return bytes;
}

/** The bytes of a module with one convolution for each distance of two pixels' inputs. */
export function assembleModule(inPixels) {
  const sized = (bytes) => [...leb(bytes.length), ...bytes];
  const section = (id, items) => [id, ...sized([...leb(items.length), ...items.flat()])];
  const name = (text) => sized([...text].map((letter) => letter.charCodeAt(0)));
  const type = [0x60, ...sized(ARGUMENTS.map(() => I32)), 0];
  const locals = [2, ...leb(INTEGERS.length), I32, ...leb(VECTORS.length), V128];
  const body = (inPixel) => sized([...locals, ...assemble(convolution(inPixel)), 0x0b]);
  return new Uint8Array([
    ...[0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0], // "\0asm", version 1
    ...section(1, [type]),
    ...section(2, [[...name("page"), ...name("memory"), 2, 0, 1]]), // a memory, at least 1 page
    ...section(3, inPixels.map(() => [0])),
    ...section(7, inPixels.map((inPixel, i) => [...name(`conv${inPixel}`), 0, ...leb(i)])),
    ...section(10, inPixels.map(body)),
  ]);
}

/** inPixel -> convolution on this memory; in plain JavaScript where WebAssembly lacks SIMD. */
export function convolutions(memory, inPixels, plain = false) {
  const bytes = assembleModule(inPixels);
  if (plain || !WebAssembly.validate(bytes)) {
    const numbers = new Float32Array(memory.buffer);
    return new Map(inPixels.map((inPixel) => [inPixel, plainConvolution(numbers, inPixel)]));
  }
  const module = new WebAssembly.Module(bytes);
  const { exports } = new WebAssembly.Instance(module, { page: { memory } });
  return new Map(inPixels.map((inPixel) => [inPixel, exports[`conv${inPixel}`]]));
}
