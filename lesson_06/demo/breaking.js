// The fourth panel: what happens when one thing is left out.

import { makeRow } from "./between.js";
import { Controls } from "./controls.js";
import { Lines } from "./lines.js";
import { number } from "./mathematics.js";
import { lastDeviation } from "./samplers.js";

const COUNT = 6; // noises: the seed and the next ones
const MAGNIFIED = 30;

const USUAL = { label: "none", guidance: 1, steps: 25 };

/** What differs from the lesson, what one sees, and the settings that show it well. */
const BREAKS = {
  silent: {
    broken: { clip: true, broken: "silent" },
    text: `With η = 1 each step keeps only a part of the predicted noise, and new noise replaces the
      rest. Without new noise too little is left, and all starts end in nearly the same digit. (With
      η = 0, as in Denoise, all of the predicted noise that belongs to s is kept.)`,
    line: { math: "x_s=√{ᾱ_s} x̂_0+√{1-ᾱ_s-σ^2} ε̂", mirror: "mean", gone: "noise" },
  },
  late: {
    broken: { clip: true, broken: "late" },
    text: `Noise that is added to the last image stays in it. Here it is about one grey level, too little
      to see; the lower rows show it ${MAGNIFIED} times as bright.`,
    line: { math: "x_0=μ+√{β̃_2} z", mirror: "late", gone: "p_sample" },
    magnified: true,
  },
  clipping: {
    broken: { clip: false },
    text: `With much guidance and few steps the estimates of the clean image lie far outside white and
      black. Without clipping the strokes grow too thick, and some pixels of the result lie outside, too
      (pink). With little guidance this network needs no clipping: try 1.`,
    settings: { label: "3", guidance: 16, steps: 10 },
    line: { math: "x̂_0=\\frac{x_t-√{1-ᾱ_t} ε̂}{√{ᾱ_t}}", mirror: "x0", gone: "use_clip" },
  },
  number: {
    broken: { clip: true, broken: "number" },
    text: `The network gets the number of the step, 1 to S, in place of the time, 1 to 1000. It takes
      every image for almost clean and sees too little noise in it.`,
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
      ...makeRow(rows, `As it should be, dark pixels ${MAGNIFIED} times as bright`, COUNT),
      ...makeRow(rows, `Broken, dark pixels ${MAGNIFIED} times as bright`, COUNT),
    ];
    this.extra = [...rows.children].slice(4);
    this.controls = new Controls(panel.querySelector("form"), () => this.start());
    for (const choice of panel.querySelectorAll("[name=what]")) {
      choice.addEventListener("input", () => {
        this.controls.set({ ...USUAL, ...BREAKS[choice.value].settings });
      });
    }
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
    const done = await this.engine.run("breakIt", { ...options, ...both }, (result) => {
      const { index, step, s, xs, raw } = result;
      this.pictures[index].image(xs, { outside: s === 0 });
      if (what === "clipping" && step === 0) this.showRange(raw);
      if (magnified) this.magnified[index].image(xs.map((x) => MAGNIFIED * (x + 1) - 1));
    });
    this.finished = done !== null;
    this.timed(done);
  }

  /** Adds the smallest and the largest number of an image to the line of code. */
  showRange(image) {
    const [low, high] = [Math.min(...image), Math.max(...image)];
    const numbers = `in the first step from ${number(low)} to ${number(high)}`;
    this.lines.show([{ ...BREAKS.clipping.line, numbers }]);
  }
}
