// Computes in the background, so that the page never waits. A new job ends the one before it.

import { fromBase64, readCheckpoint } from "./checkpoint.js";
import { Network } from "./network.js";
import { TorchRandom } from "./random.js";
import { ddimEncodeTrajectory, ddimTimesteps, ddimTrajectory, guided } from "./samplers.js";
import { qSample, slerp } from "./samplers.js";

const PIXELS_OF_IMAGE = 784;

/** Each job is a generator; what it yields goes to the page. */
export class Jobs {
  constructor(checkpoint, alphaBar, plain = false) {
    const bytes = fromBase64(checkpoint);
    this.network = new Network(readCheckpoint(bytes), plain);
    this.alphaBar = new Float64Array(fromBase64(alphaBar).buffer);
    this.T = this.alphaBar.length - 1;
  }

  *denoise({ label, guidance, steps, eta, spacing, clip, seed }) {
    const random = new TorchRandom(seed);
    const xT = random.normal(PIXELS_OF_IMAGE);
    const times = ddimTimesteps(this.T, steps, spacing);
    const predict = guided(this.network, label, guidance);
    yield* ddimTrajectory(predict, this.alphaBar, xT, random, { times, eta, clip });
  }

  /** Noises an image to time t and walks back. */
  *walkBack({ image, t, label, guidance, steps, eta, clip, seed }) {
    const random = new TorchRandom(seed);
    const xt = qSample(image, random.normal(PIXELS_OF_IMAGE), this.alphaBar[t]);
    const times = ddimTimesteps(t, Math.min(steps, t), "trailing");
    const predict = guided(this.network, label, guidance);
    yield { start: xt };
    yield* ddimTrajectory(predict, this.alphaBar, xt, random, { times, eta, clip });
  }

  /** Encodes an image as noise and decodes it. */
  *encode({ image, label, steps, spacing }) {
    const predict = guided(this.network, label, 1);
    const times = ddimTimesteps(this.T, steps, spacing);
    let code = image;
    for (const step of ddimEncodeTrajectory(predict, this.alphaBar, image, times)) {
      code = step.xs;
      yield { encoding: step };
    }
    yield* ddimTrajectory(predict, this.alphaBar, code, null, { times });
  }

  /** Samples from points between two noises, on the arc and on the straight line. */
  *between({ seeds, columns, label, guidance, steps }) {
    const [x, y] = seeds.map((seed) => new TorchRandom(seed).normal(PIXELS_OF_IMAGE));
    const fractions = Array.from({ length: columns }, (_, i) => i / (columns - 1));
    const arc = fractions.map((f) => slerp(x, y, f).value);
    const line = fractions.map((f) => x.map((v, i) => (1 - f) * v + f * y[i]));
    yield { ends: [x, y], starts: [...arc, ...line] };
    const times = ddimTimesteps(this.T, steps);
    const predict = guided(this.network, label, guidance);
    yield* this.together([...arc, ...line], (xT) =>
      ddimTrajectory(predict, this.alphaBar, xT, null, { times }),
    );
  }

  /** Samples with and without one thing left out, from the same noises. */
  *breakIt({ count, seed, steps, label, guidance, sound, broken }) {
    const times = ddimTimesteps(this.T, steps);
    const predict = guided(this.network, label, guidance);
    const starts = [sound, broken].flatMap((options) =>
      Array.from({ length: count }, (_, k) => ({ options, seed: seed + k })),
    );
    yield* this.together(starts, ({ options, seed }) => {
      const random = new TorchRandom(seed);
      const xT = random.normal(PIXELS_OF_IMAGE);
      return ddimTrajectory(predict, this.alphaBar, xT, random, { times, eta: 1, ...options });
    });
  }

  /** Several trajectories, a step of each in turn. Yields what the page shows of one of them. */
  *together(starts, trajectory) {
    const running = starts.map(trajectory);
    for (let step = 0; ; step++) {
      for (const [index, each] of running.entries()) {
        const { done, value } = each.next();
        if (done) return;
        const { t, s, xs, x0, raw } = value;
        yield { index, step, t, s, xs, x0, raw };
      }
    }
  }

  /** What the network is trained on: one image, one noise, one time, or several. */
  *loss({ image, label, times, seed }) {
    const eps = new TorchRandom(seed).normal(PIXELS_OF_IMAGE);
    const predict = guided(this.network, label, 1);
    for (const t of times) {
      const alphaT = this.alphaBar[t];
      const xt = qSample(image, eps, alphaT);
      yield { t, alphaT, xt, eps, epsHat: predict(xt, t).eps };
    }
  }
}

/** Answers the messages that arrive at a port: the worker itself, or one end of a channel. */
export function serve(port) {
  let jobs = null;
  let current = 0;
  const waiting = [];
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => waiting.shift()();
  const breath = () => new Promise((resolve) => port2.postMessage(waiting.push(resolve)));

  port.onmessage = async ({ data: { id, job, ...options } }) => {
    current = id;
    if (job === "stop") return;
    const began = performance.now();
    if (job === "open") jobs = new Jobs(options.checkpoint, options.alphaBar);
    const before = jobs.network.passes;
    for (const result of job === "open" ? [] : jobs[job](options)) {
      port.postMessage({ id, result });
      await breath(); // lets a newer message in
      if (current !== id) return;
    }
    const passes = jobs.network.passes - before;
    port.postMessage({ id, done: true, milliseconds: performance.now() - began, passes });
  };
}
