// The two loops that take nearly all the time of the network, convolution and normalisation, twice:
// in plain JavaScript, to read and as a fallback, and in WebAssembly with 4 numbers at a time,
// assembled here when the page opens. (A module compiled elsewhere would be a binary file in the
// repository.)
//
// Images lie in memory pixel by pixel, the channels of a pixel side by side. Then the inputs of one
// output pixel of a 3x3 convolution are three runs of 3 * channels numbers, one in each row.

export const PIXELS = 7; // output pixels at a time: the widths are 28, 14 and 7
const LANES = 4; // output channels at a time

/** Rounded up to a whole number of lanes. */
export const padded = (channels) => Math.ceil(channels / LANES) * LANES;

// The arguments of a convolution. Places and distances count bytes.
const CONVOLUTION = [
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

// The arguments of a normalisation: out = a x + b for each channel, then SiLU where asked for.
const NORMALISATION = [
  "input", // places: [rows][columns][4 groups]
  "a", // [4 groups]
  "b",
  "output",
  "rows",
  "columns",
  "groups",
  "gap", // bytes between two rows of the output
];

export const silu = (value) => value / (1 + Math.exp(-value));

/** The convolution in plain JavaScript, on the memory's numbers. */
function plainConvolution(numbers, inPixel) {
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

/** The normalisation in plain JavaScript. */
function plainNormalisation(numbers, activate) {
  return (input, a, b, output, rows, columns, groups, gap) => {
    let [from, to] = [input / 4, output / 4];
    for (let y = 0; y < rows; y++, to += gap / 4) {
      for (let x = 0; x < columns; x++) {
        for (let c = 0; c < 4 * groups; c++) {
          const value = numbers[a / 4 + c] * numbers[from++] + numbers[b / 4 + c];
          numbers[to++] = activate ? silu(value) : value;
        }
      }
    }
  };
}

// Pieces of WebAssembly's text.
const add = (name, by) => `local.get ${name} ${by} i32.add local.set ${name}`;
const repeat = (counter, body) => `
  loop ${body}
    local.get ${counter} i32.const 1 i32.sub local.tee ${counter} br_if 0
  end`;
const all = (value) => `f32.const ${value} f32x4.splat`;

/** The same in WebAssembly's text: 7 pixels by 4 channels in registers. */
function convolution(inPixel) {
  const pixels = (line) => Array.from({ length: PIXELS }, (_, j) => line(j)).join("\n");
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
    local.get q v128.load 0 local.set weights
    ${pixels((j) => `local.get weights local.set sum${j}`)}
    local.get from local.set start
    local.get runs local.set run
    ${repeat("run", `local.get start local.tee p local.get length i32.add local.set end
      ${products} ${add("start", "local.get runStep")}`)}
    local.get to local.set p
    ${pixels((j) => `
      local.get p local.get sum${j} v128.store 0
      ${add("p", "local.get outPixel")}`)}
    ${add("q", "i32.const 16")}
    ${add("to", "i32.const 16")}`;
  return repeat("rows", `
    local.get input local.set from
    local.get output local.set block
    local.get blocks local.set x
    ${repeat("x", `
      local.get weight local.set w
      local.get bias local.set q
      local.get block local.set to
      local.get groups local.set g
      ${repeat("g", group)}
      ${add("from", `i32.const ${PIXELS * inPixel}`)}
      local.get block local.get outPixel i32.const ${PIXELS} i32.mul i32.add local.set block`)}
    ${add("input", "local.get inRow")}
    ${add("output", "local.get outRow")}`);
}

/** The normalisation: 4 channels at a time. */
function normalisation(activate) {
  return repeat("rows", `
    local.get columns local.set x
    ${repeat("x", `
      i32.const 0 local.set p
      local.get groups local.set g
      ${repeat("g", `
        local.get output
        local.get input v128.load 0
        local.get a local.get p i32.add v128.load 0 f32x4.mul
        local.get b local.get p i32.add v128.load 0 f32x4.add
        ${activate ? SILU : ""}
        v128.store 0
        ${["input", "output", "p"].map((name) => add(name, "i32.const 16")).join("\n")}`)}`)}
    ${add("output", "local.get gap")}`);
}

// v -> v / (1 + e^-v). With -v = n ln 2 + f, e^-v is 2^n e^f: 2^n is made from the bits of a number,
// and e^f, |f| <= ln 2 / 2, from the first seven terms of its series.
const SERIES = [1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1];
const SILU = `
  local.tee v
  local.get v f32x4.neg ${all(-87)} f32x4.max ${all(87)} f32x4.min local.tee f
  ${all(Math.LOG2E)} f32x4.mul f32x4.nearest local.set n
  local.get f local.get n ${all(Math.LN2)} f32x4.mul f32x4.sub local.set f
  ${SERIES.map((term, i) => (i ? `local.get f f32x4.mul ${all(term)} f32x4.add` : all(term))).join(" ")}
  local.get n i32x4.trunc_sat_f32x4_s i32.const 127 i32x4.splat i32x4.add
  i32.const 23 i32x4.shl
  f32x4.mul ${all(1)} f32x4.add f32x4.div`;

const INTEGERS = "from block to x g w q start run p end".split(" ");
const VECTORS = ["v", "n", "f", "weights", ...Array.from({ length: PIXELS }, (_, j) => `sum${j}`)];
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
  "f32.const": [[0x43], "float"],
  "i32.ne": [[0x47]],
  "i32.add": [[0x6a]],
  "i32.sub": [[0x6b]],
  "i32.mul": [[0x6c]],
  "v128.load": [[0xfd, 0x00, 4], "offset"],
  "v128.load32_splat": [[0xfd, 0x09, 2], "offset"],
  "v128.store": [[0xfd, 0x0b, 4], "offset"],
  "i32x4.splat": [[0xfd, 0x11]],
  "f32x4.splat": [[0xfd, 0x13]],
  "f32x4.nearest": [[0xfd, 0x6a]],
  "i32x4.shl": [[0xfd, 0xab, 0x01]],
  "i32x4.add": [[0xfd, 0xae, 0x01]],
  "f32x4.neg": [[0xfd, 0xe1, 0x01]],
  "f32x4.add": [[0xfd, 0xe4, 0x01]],
  "f32x4.sub": [[0xfd, 0xe5, 0x01]],
  "f32x4.mul": [[0xfd, 0xe6, 0x01]],
  "f32x4.div": [[0xfd, 0xe7, 0x01]],
  "f32x4.min": [[0xfd, 0xe8, 0x01]],
  "f32x4.max": [[0xfd, 0xe9, 0x01]],
  "i32x4.trunc_sat_f32x4_s": [[0xfd, 0xf8, 0x01]],
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

const sized = (bytes) => [...leb(bytes.length), ...bytes];

/** The bytes of a function's body. */
function assemble(parameters, text) {
  const locals = [...parameters, ...INTEGERS, ...VECTORS];
  const operands = {
    local: (word) => leb(locals.indexOf(word)),
    number: (word) => leb(Number(word), true),
    offset: (word) => leb(Number(word)),
    float: (word) => new Uint8Array(Float32Array.of(Number(word)).buffer),
  };
  const bytes = [2, ...leb(INTEGERS.length), I32, ...leb(VECTORS.length), V128];
  const words = text.trim().split(/\s+/);
  while (words.length) {
    const [code, operand] = INSTRUCTIONS[words.shift()];
    bytes.push(...code, ...(operand ? operands[operand](words.shift()) : []));
  }
  return sized([...bytes, 0x0b]);
}

/** The bytes of a module with a convolution for each distance of two pixels' inputs, and the two
 * normalisations. */
function assembleModule(inPixels) {
  const functions = [
    ...inPixels.map((inPixel) => [`conv${inPixel}`, 0, convolution(inPixel)]),
    ["scale", 1, normalisation(false)],
    ["silu", 1, normalisation(true)],
  ];
  const parameters = [CONVOLUTION, NORMALISATION];
  const section = (id, items) => [id, ...sized([...leb(items.length), ...items.flat()])];
  const name = (text) => sized([...text].map((letter) => letter.charCodeAt(0)));
  return new Uint8Array([
    ...[0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0], // "\0asm", version 1
    ...section(1, parameters.map((names) => [0x60, ...sized(names.map(() => I32)), 0])),
    ...section(2, [[...name("page"), ...name("memory"), 2, 0, 1]]), // a memory, at least 1 page
    ...section(3, functions.map(([, type]) => [type])),
    ...section(7, functions.map(([exported], i) => [...name(exported), 0, ...leb(i)])),
    ...section(10, functions.map(([, type, text]) => assemble(parameters[type], text))),
  ]);
}

/** The functions conv16, conv64 ... (one for each distance in inPixels), scale and silu, on this
 * memory; in plain JavaScript where WebAssembly lacks vectors. */
export function makeKernels(memory, inPixels, plain = false) {
  const bytes = assembleModule(inPixels);
  if (!plain && WebAssembly.validate(bytes)) {
    return new WebAssembly.Instance(new WebAssembly.Module(bytes), { page: { memory } }).exports;
  }
  const numbers = new Float32Array(memory.buffer);
  const each = inPixels.map((inPixel) => [`conv${inPixel}`, plainConvolution(numbers, inPixel)]);
  return {
    ...Object.fromEntries(each),
    scale: plainNormalisation(numbers, false),
    silu: plainNormalisation(numbers, true),
  };
}
