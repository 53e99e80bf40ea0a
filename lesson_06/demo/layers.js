// The layers that the network is made of: lesson_05/unet.py.
//
// Each layer is laid out once, with memory of its own; a pass runs them one after the other. An image
// is { data, height, width, channels, edge }: its numbers lie pixel by pixel, within an edge of zeros
// that is 0 or 1 pixel wide.

import { PIXELS, makeKernels, padded } from "./kernel.js";

const MEMORY_PAGES = 256; // of 64 KiB
const EPSILON = 1e-6; // of every group normalisation

const place = (image, y, x) =>
  ((y + image.edge) * (image.width + 2 * image.edge) + x + image.edge) * image.channels;

export class Layers {
  /** weights: name -> { shape, values }. groups: of every group normalisation. */
  constructor(weights, groups) {
    this.weights = weights;
    this.groups = groups;
    this.memory = new WebAssembly.Memory({ initial: MEMORY_PAGES });
    this.used = 0;
    this.layers = [];
    this.inPixels = new Set();
  }

  /** After the last layer. plain: without WebAssembly. */
  prepare(plain) {
    this.kernels = makeKernels(this.memory, [...this.inPixels], plain);
  }

  /** Downsample: stride 2, an edge of zeros on the right and below. */
  downsample(name, h) {
    const { at, weight, bias, channels } = this.kernel(name, h.channels);
    const out = this.image(h.height / 2, h.width / 2, channels);
    this.convolve(this.withEdge(h), { at, weight, bias, out, stride: 2, first: [0, 0] });
    return out;
  }

  /** Upsample: every pixel doubled, then a 3x3 convolution. An output pixel sees 2x2 input pixels,
   * whose weights are the sums of the 3x3 weights that meet them. */
  upsample(name, h) {
    const { at, bias, channels } = this.kernel(name, h.channels);
    const out = this.image(2 * h.height, 2 * h.width, channels);
    const source = this.withEdge(h);
    const meets = [[[0], [1, 2]], [[0, 1], [2]]]; // [even, odd output][input] -> rows or columns
    for (const [oddY, rows] of meets.entries()) {
      for (const [oddX, columns] of meets.entries()) {
        const weight = this.pack(channels, 2, 2 * h.channels, (o, run, i) => {
          const [c, x] = [i % h.channels, Math.floor(i / h.channels)];
          const pairs = rows[run].flatMap((ky) => columns[x].map((kx) => at(o, c, ky, kx)));
          return pairs.reduce((sum, value) => sum + value, 0);
        });
        const options = { weight, bias, out, runs: 2, every: 2 };
        options.first = [oddY - 1, oddX - 1];
        options.to = [oddY, oddX];
        this.convolve(source, options);
      }
    }
    return out;
  }

  /** A 3x3 convolution of an image with an edge. time: a layer whose output is added. */
  conv(name, h, { time } = {}) {
    const { weight, bias, channels } = this.kernel(name, h.channels);
    if (time) this.addTime(bias, time);
    const out = this.image(h.height, h.width, padded(channels));
    this.convolve(h, { weight, bias, out });
    return out;
  }

  linear(name, h) {
    const { shape, values } = this.weights.get(`${name}.weight`);
    const weight = this.pack(shape[0], 1, h.channels, (o, _, i) => values[o * h.channels + i]);
    const bias = this.bias(name);
    const out = this.image(h.height, h.width, shape[0]);
    this.convolve(h, { weight, bias, out, runs: 1, first: [0, 0] });
    return out;
  }

  /** The packed weights and the bias of a 3x3 convolution, and its weights by position. */
  kernel(name, inChannels) {
    const { shape, values } = this.weights.get(`${name}.weight`);
    const at = (o, c, ky, kx) => values[((o * inChannels + c) * 3 + ky) * 3 + kx];
    const weight = this.pack(shape[0], 3, 3 * inChannels, (o, run, i) =>
      at(o, i % inChannels, run, Math.floor(i / inChannels)),
    );
    return { at, weight, bias: this.bias(name), channels: shape[0] };
  }

  /** Weights in the order in which the convolution reads them. */
  pack(outChannels, runs, length, value) {
    const packed = this.numbers(padded(outChannels) * runs * length);
    for (let o = 0; o < outChannels; o++) {
      for (let run = 0; run < runs; run++) {
        for (let i = 0; i < length; i++) {
          const group = ((o >> 2) * runs + run) * length;
          packed[(group + i) * 4 + (o & 3)] = value(o, run, i);
        }
      }
    }
    return packed;
  }

  bias(name) {
    const { values } = this.weights.get(`${name}.bias`);
    const bias = this.numbers(padded(values.length));
    bias.set(values);
    return bias;
  }

  /** Lays out a convolution. first: the offset of the first input pixel; to, every: the place of
   * the first output pixel and the distance to the next. */
  convolve(h, options) {
    const { weight, bias, out, stride = 1, runs = 3 } = options;
    const { first = [-1, -1], to = [0, 0], every = 1 } = options;
    const inPixel = 4 * stride * h.channels;
    const inLine = 4 * (h.width + 2 * h.edge) * h.channels;
    const [rows, columns] = [out.height / every, out.width / every];
    if (columns % PIXELS) throw new Error(`a width of ${columns}: not a multiple of ${PIXELS}`);
    this.inPixels.add(inPixel);
    const call = [
      h.data.byteOffset + 4 * place(h, ...first),
      weight.byteOffset,
      bias.byteOffset,
      out.data.byteOffset + 4 * place(out, ...to),
      rows,
      columns / PIXELS,
      out.channels / 4,
      runs,
      weight.byteLength / runs / out.channels,
      inLine,
      stride * inLine,
      4 * every * out.width * out.channels,
      4 * every * out.channels,
    ];
    this.layers.push(() => this.kernels[`conv${inPixel}`](...call));
  }

  /** Group normalisation and, where asked for, SiLU: a x + b, with a and b for each channel. */
  norm(name, h, { activate = false, edge = 0 } = {}) {
    const scale = this.weights.get(`${name}.weight`).values;
    const shift = this.weights.get(`${name}.bias`).values;
    const out = this.image(h.height, h.width, h.channels, edge);
    const size = h.channels / this.groups;
    const [a, b] = [this.numbers(h.channels), this.numbers(h.channels)];
    this.layers.push(() => {
      for (let first = 0; first < h.channels; first += size) {
        const { mean, deviation } = moments(h, first, size);
        for (let c = first; c < first + size; c++) {
          a[c] = scale[c] / deviation;
          b[c] = shift[c] - mean * a[c];
        }
      }
    });
    const places = [h.data, a, b].map((numbers) => numbers.byteOffset);
    const to = out.data.byteOffset + 4 * place(out, 0, 0);
    const gap = 8 * edge * h.channels; // bytes between two rows of the output
    const call = [...places, to, h.height, h.width, h.channels / 4, gap];
    const kernel = activate ? "silu" : "scale";
    this.layers.push(() => this.kernels[kernel](...call));
    return out;
  }

  withEdge(h) {
    const out = this.image(h.height, h.width, h.channels, 1);
    this.layers.push(() => copyInto(out, h.data));
    return out;
  }

  add(h, other) {
    this.layers.push(() => {
      for (let i = 0; i < h.data.length; i++) h.data[i] += other.data[i];
    });
    return h;
  }

  concatenate(h, skip) {
    const out = this.image(h.height, h.width, h.channels + skip.channels);
    this.layers.push(() => {
      for (let i = 0, to = 0; to < out.data.length; i++, to += out.channels) {
        out.data.set(h.data.subarray(i * h.channels, (i + 1) * h.channels), to);
        const from = skip.data.subarray(i * skip.channels, (i + 1) * skip.channels);
        out.data.set(from, to + h.channels);
      }
    });
    return out;
  }

  image(height, width, channels, edge = 0) {
    const data = this.numbers((height + 2 * edge) * (width + 2 * edge) * channels);
    return { data, height, width, channels, edge };
  }

  /** Memory for so many numbers, from a multiple of 16 bytes on. */
  numbers(count) {
    const numbers = new Float32Array(this.memory.buffer, this.used, count);
    this.used += Math.ceil((4 * count) / 16) * 16;
    return numbers;
  }
}

/** Copies rows of pixels into an image with an edge. */
export function copyInto(image, values) {
  const line = image.width * image.channels;
  for (let y = 0; y < image.height; y++) {
    image.data.set(values.subarray(y * line, (y + 1) * line), place(image, y, 0));
  }
}

/** The mean and the standard deviation of some channels of an image without an edge. */
function moments({ data, channels }, first, size) {
  let sum = 0;
  let squares = 0;
  for (let i = first; i < data.length; i += channels) {
    for (let c = i; c < i + size; c++) {
      sum += data[c];
      squares += data[c] * data[c];
    }
  }
  const count = (data.length / channels) * size;
  const mean = sum / count;
  return { mean, deviation: Math.sqrt(squares / count - mean * mean + EPSILON) };
}
