// lesson_05/class_conditional/network.py: the U-Net that predicts the noise in an image of a digit.

import { padded, silu } from "./kernel.js";
import { Layers, copyInto } from "./layers.js";

export class Network extends Layers {
  /** plain: without WebAssembly. */
  constructor({ config, weights }, plain = false) {
    super(weights, config.network.num_groups);
    this.config = config.network;
    this.nullLabel = config.num_classes;
    this.passes = 0;
    this.emb = new Float32Array(4 * this.config.channels);
    const size = this.config.image_size;
    this.input = this.image(size, size, this.config.image_channels, 1);
    this.output = this.layOut();
    this.prepare(plain);
  }

  /** The noise in xt (784 numbers) at time t, for a digit or for the null label. */
  predict(xt, t, label) {
    this.passes++;
    this.embed(t, label);
    copyInto(this.input, xt);
    for (const run of this.layers) run();
    const { data, channels } = this.output;
    return Float32Array.from(xt, (_, i) => data[i * channels]);
  }

  /** UNet.__init__ and UNet.estimate, lesson_05/unet.py. */
  layOut() {
    const { channels, multipliers, num_blocks, attention_resolutions } = this.config;
    let h = this.conv("conv_in", this.input);
    const skips = [h];
    let layer = 0;
    for (const [level, multiplier] of multipliers.entries()) {
      if (level > 0) skips.push((h = this.downsample(`down.${layer++}`, h)));
      for (let i = 0; i < num_blocks; i++) {
        const attention = attention_resolutions.includes(h.height);
        skips.push((h = this.block(`down.${layer++}`, h, multiplier * channels, attention)));
      }
    }
    h = this.block("middle.0", h, h.channels, true);
    h = this.block("middle.1", h, h.channels, false);
    layer = 0;
    for (const [level, multiplier] of [...multipliers.entries()].reverse()) {
      for (let i = 0; i <= num_blocks; i++) {
        const attention = attention_resolutions.includes(h.height);
        h = this.concatenate(h, skips.pop());
        h = this.block(`up.${layer++}`, h, multiplier * channels, attention);
      }
      if (level > 0) h = this.upsample(`up.${layer++}`, h);
    }
    return this.conv("conv_out", this.norm("norm_out", h, { activate: true, edge: 1 }));
  }

  block(name, h, outChannels, attention) {
    const residual = this.residual(`${name}.residual`, h, outChannels);
    return attention ? this.attention(`${name}.attention`, residual) : residual;
  }

  /** ResidualBlock. The time's part is the same for every pixel: it is added to the bias. */
  residual(name, h, outChannels) {
    const shortcut = h.channels === outChannels ? h : this.linear(`${name}.shortcut`, h);
    const first = this.norm(`${name}.norm1`, h, { activate: true, edge: 1 });
    let y = this.conv(`${name}.conv1`, first, { time: `${name}.time` });
    y = this.norm(`${name}.norm2`, y, { activate: true, edge: 1 });
    y = this.conv(`${name}.conv2`, y);
    return this.add(y, shortcut);
  }

  /** SelfAttention: softmax(q kᵀ / √d) v. Both products run as convolutions of one pixel, whose
   * weights are the keys and the values of all pixels. */
  attention(name, h) {
    if (this.config.num_heads !== 1) throw new Error("more than one head of attention");
    const [count, size] = [h.height * h.width, h.channels];
    const qkv = this.linear(`${name}.qkv`, this.norm(`${name}.norm`, h));
    const scores = this.image(h.height, h.width, padded(count));
    const mixed = this.image(h.height, h.width, size);
    const keys = this.numbers(scores.channels * size);
    const values = this.numbers(count * size);
    this.layers.push(() => {
      for (let i = 0; i < count; i++) {
        for (let c = 0; c < size; c++) {
          const from = i * qkv.channels + c;
          keys[((i >> 2) * size + c) * 4 + (i & 3)] = qkv.data[from + size];
          values[((c >> 2) * count + i) * 4 + (c & 3)] = qkv.data[from + 2 * size];
        }
      }
    });
    const product = (source, weight, out) => {
      const bias = this.numbers(out.channels);
      this.convolve(source, { weight, bias, out, runs: 1, first: [0, 0] });
    };
    product(qkv, keys, scores);
    this.layers.push(() => softmax(scores, count, Math.sqrt(size)));
    product(scores, values, mixed);
    return this.add(this.linear(`${name}.out`, mixed), h);
  }

  addTime(bias, name) {
    const own = bias.slice();
    this.layers.push(() => {
      const time = this.dense(name, this.emb.map(silu));
      time.forEach((value, o) => (bias[o] = own[o] + value));
    });
  }

  /** The embeddings of the time and of the label, added. */
  embed(t, label) {
    const { channels } = this.config;
    const angles = new Float32Array(channels);
    const half = channels / 2;
    for (let i = 0; i < half; i++) {
      const angle = (t - 1) * 10 ** ((-4 * i) / (half - 1));
      angles[i] = Math.sin(angle);
      angles[half + i] = Math.cos(angle);
    }
    const hidden = this.dense("time.0", angles).map(silu);
    const time = this.dense("time.2", hidden);
    const table = this.weights.get("label.weight").values;
    this.emb = time.map((value, i) => value + table[label * time.length + i]);
  }

  dense(name, input) {
    const weight = this.weights.get(`${name}.weight`).values;
    return this.weights.get(`${name}.bias`).values.map((sum, o) => {
      for (let i = 0; i < input.length; i++) sum += weight[o * input.length + i] * input[i];
      return sum;
    });
  }
}

/** Makes the scores of each pixel, over a temperature, positive numbers with the sum 1. */
function softmax({ data, channels }, count, temperature) {
  for (let first = 0; first < data.length; first += channels) {
    const scores = data.subarray(first, first + count);
    const largest = Math.max(...scores);
    let total = 0;
    for (let j = 0; j < count; j++) {
      total += scores[j] = Math.exp((scores[j] - largest) / temperature);
    }
    for (let j = 0; j < count; j++) scores[j] /= total;
  }
}
