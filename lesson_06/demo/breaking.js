// The fourth panel: what happens when one thing is left out.

import { makeRow } from "./between.js";
import { Controls } from "./controls.js";
import { Lines } from "./lines.js";
import { number } from "./mathematics.js";
import { lastDeviation } from "./samplers.js";

const COUNT = 6; // digits 0 to 5
const MAGNIFIED = 30;

/** What differs from the lesson, and what one sees. */
const BREAKS = {
  silent: {
    broken: { clip: true, broken: "silent" },
    text: `Each step takes some of the old noise away and should add a little new noise. Without the
      new noise there is less of it in the image than the network expects, and it draws digits that
      are too plain, or blank.`,
    line: { math: "x_s=√{ᾱ_s} x̂_0+√{1-ᾱ_s-σ^2} ε̂", mirror: "mean", gone: "noise" },
  },
  late: {
    broken: { clip: true, broken: "late" },
    text: `The last image should be the clean one. Noise that is added to it stays: about one grey
      level, which the lower rows show ${MAGNIFIED} times as strong.`,
    line: { math: "x_0=μ+√{β̃_2} z", mirror: "late", gone: "p_sample" },
    magnified: true,
  },
  clipping: {
    broken: { clip: false },
    text: `The first estimates of the clean image lie far outside white and black, by a factor of up
      to 100 at t = 1000. Clipped to [−1, 1] they do no harm. Try more guidance, or few steps.`,
    line: { math: "x̂_0=\\frac{x_t-√{1-ᾱ_t} ε̂}{√{ᾱ_t}}", mirror: "x0", gone: "use_clip" },
  },
  number: {
    broken: { clip: true, broken: "number" },
    text: `The network is told the number of the step, 1 to S, in place of its time, 1 to 1000. It
      takes every image for almost clean and sees too little noise in it.`,
    line: { math: "ε̂=ε̂(x_t, i)", mirror: "number", gone: "predict" },
  },
};

export class BreakPanel {
  constructor(panel, { engine, alphaBar, timed }) {
    Object.assign(this, { panel, engine, alphaBar, timed });
    this.find = (name) => panel.querySelector(`[data-${name}]`);
    this.lines = new Lines(this.find("lines"));
    const rows = this.find("rows");
    this.pictures = [
      ...makeRow(rows, "As it should be", COUNT),
      ...makeRow(rows, "Broken", COUNT),
    ];
    this.magnified = [
      ...makeRow(rows, `As it should be, the dark ${MAGNIFIED} times as bright`, COUNT),
      ...makeRow(rows, `Broken, the dark ${MAGNIFIED} times as bright`, COUNT),
    ];
    this.extra = [...rows.children].slice(4);
    this.controls = new Controls(panel.querySelector("form"), () => this.start());
  }

  open() {
    if (!this.finished) this.start();
  }

  close() {}

  async start() {
    const { what, ...options } = this.controls.values;
    const { broken, text, line, magnified } = BREAKS[what];
    this.finished = false;
    this.find("result").textContent = text;
    const deviation = `√β̃ = ${number(lastDeviation(this.alphaBar))}`;
    this.lines.show([{ ...line, numbers: magnified ? deviation : "" }]);
    for (const part of this.extra) part.hidden = !magnified;
    const both = { count: COUNT, sound: { clip: true }, broken };
    const done = await this.engine.run("breakIt", { ...options, ...both }, ({ index, xs }) => {
      this.pictures[index].image(xs);
      if (magnified) this.magnified[index].image(xs.map((x) => MAGNIFIED * (x + 1) - 1));
    });
    this.finished = done !== null;
    this.timed(done);
  }
}
