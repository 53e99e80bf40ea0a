// The worker of the built page against what PyTorch computed: node numbers.mjs DEMO.HTML VECTORS.JSON

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

import { centred } from "../../lesson_06/demo/drawing.js";

const [html, vectors] = process.argv.slice(2).map((file) => readFileSync(file, "utf8"));
const expected = JSON.parse(vectors);
const part = (id) => html.split(`id="${id}">`)[1].split("</script>")[0];
const names = "{ Jobs, TorchRandom, ddimTimesteps, meanSquare, slerp }";
const worker = new Function(`${part("worker")}\nreturn ${names};`)();
const { Jobs, TorchRandom, ddimTimesteps, meanSquare, slerp } = worker;

const jobs = new Jobs(part("checkpoint"), part("alpha-bar"));
const plain = new Jobs(part("checkpoint"), part("alpha-bar"), true);

const difference = (x, y) => {
  assert.equal(x.length, y.length);
  return x.reduce((most, value, i) => Math.max(most, Math.abs(value - y[i])), 0);
};
const largest = (x) => x.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
const level = (value) => Math.round(Math.min(Math.max(value, -1), 1) * 127.5 + 127.5);
const last = (generator) => [...generator].at(-1);

const checks = {
  "noise is PyTorch's"() {
    const errors = expected.noise.map(([seed, first, second]) => {
      const random = new TorchRandom(seed);
      return Math.max(difference(random.normal(784), first), difference(random.normal(784), second));
    });
    return [Math.max(...errors), 2e-6];
  },
  "ᾱ is the process's"() {
    return [difference([...jobs.alphaBar], expected.alphaBar), 0];
  },
  "the times are those of ddim_timesteps"() {
    for (const [T, S, spacing, times] of expected.times) {
      assert.deepEqual(ddimTimesteps(T, S, spacing), times, `${T} ${S} ${spacing}`);
    }
    return [0, 0];
  },
  "the network, in WebAssembly": () => network(jobs),
  "the network, in plain JavaScript": () => network(plain),
  "denoise is ddim_sample"() {
    const errors = expected.denoise.map(([options, image]) =>
      compareImages(last(jobs.denoise(options)).xs, image),
    );
    return [Math.max(...errors), 3e-4];
  },
  "walking back is q_sample and ddim_step"() {
    const image = Float32Array.from(expected.digit);
    const errors = expected.walkBack.map(([options, restored]) =>
      compareImages(last(jobs.walkBack({ ...options, image })).xs, restored),
    );
    return [Math.max(...errors), 3e-4];
  },
  "encoding and decoding are ddim_encode and ddim_sample"() {
    const image = Float32Array.from(expected.digit);
    const options = { image, label: null, steps: 20, spacing: "trailing" };
    const results = [...jobs.encode(options)];
    const code = results.filter(({ encoding }) => encoding).at(-1).encoding.xs;
    const [noise, decoded] = expected.encode;
    return [Math.max(difference(code, noise), compareImages(results.at(-1).xs, decoded)), 3e-4];
  },
  "between two noises are slerp and the straight line"() {
    const options = { seeds: [1, 2], columns: 5, label: null, guidance: 1, steps: 5 };
    const [{ starts }, ...results] = jobs.between(options);
    const images = results.filter(({ step }) => step === 4);
    const errors = [1, 6].flatMap((index, i) => [
      difference(starts[index], expected.between[i][0]),
      compareImages(images[index].xs, expected.between[i][1]),
    ]);
    return [Math.max(...errors), 3e-4];
  },
  "each break is Python's"() {
    const errors = expected.breakIt.map(([what, label, image]) => {
      const broken = { clip: what !== "clipping", broken: what };
      const options = { count: 1, seed: 4, steps: 10, label, guidance: 1, broken };
      const results = [...jobs.breakIt({ ...options, sound: { clip: true } })];
      return compareImages(results.at(-1).xs, image);
    });
    return [Math.max(...errors), 3e-4];
  },
  "the loss is DDPM.loss"() {
    const image = Float32Array.from(expected.digit);
    const { eps, epsHat } = last(jobs.loss({ image, label: 7, times: [300], seed: 6 }));
    return [Math.abs(meanSquare(eps, epsHat) / expected.loss - 1), 1e-5];
  },
  "a drawing is centred as MNIST is"() {
    const size = 280;
    const stroke = (i) => {
      const [y, x] = [Math.floor(i / size), i % size];
      return x > 20 && x < 80 && y > 150 && y < 270 ? 1 : 0;
    };
    const ink = Float32Array.from({ length: size * size }, (_, i) => stroke(i));
    const image = centred(ink, size);
    const filled = [...image.keys()].filter((i) => image[i] > 0);
    const rows = filled.map((i) => Math.floor(i / 28));
    const columns = filled.map((i) => i % 28);
    assert.deepEqual([Math.min(...rows), Math.max(...rows)], [4, 23]);
    assert.deepEqual([Math.min(...columns), Math.max(...columns)], [9, 18]);
    assert.equal(centred(new Float32Array(size * size), size), null);
    return [0, 0];
  },
  "a straight angle has no arc"() {
    const x = Float32Array.of(1, 0, 2);
    const { value } = slerp(x, x.map((v) => -v), 0.25);
    return [difference(value, x.map((v) => v / 2)), 1e-6];
  },
};

function network({ network }) {
  const x = Float32Array.from(expected.noise[1][1]);
  const errors = expected.network.map(([t, label, eps]) =>
    difference(network.predict(x, t, label), eps) / largest(eps),
  );
  return [Math.max(...errors), 1e-4];
}

/** The largest difference; grey levels may differ by one. */
function compareImages(image, reference) {
  const levels = difference([...image].map(level), reference.map(level));
  assert.ok(levels <= 1, `${levels} grey levels`);
  return difference([...image], reference);
}

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    const [error, most] = check();
    assert.ok(error <= most, `error ${error.toExponential(1)}, at most ${most} is allowed`);
    console.log(`ok    ${name}: error ${error.toExponential(1)}`);
  } catch (error) {
    failed++;
    console.log(`FAIL  ${name}: ${error.message}`);
  }
}

for (const [name, { network }] of [["WebAssembly", jobs], ["plain JavaScript", plain]]) {
  const x = Float32Array.from(expected.noise[1][1]);
  for (let i = 0; i < 10; i++) network.predict(x, 500, 7);
  const before = process.cpuUsage();
  for (let i = 0; i < 20; i++) network.predict(x, 500, 7);
  const { user, system } = process.cpuUsage(before);
  console.log(`${name}: ${((user + system) / 20e3).toFixed(1)} ms of CPU a pass`);
}
process.exit(failed ? 1 : 0);
