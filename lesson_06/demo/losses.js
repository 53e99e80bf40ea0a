// The fifth panel: one term of the loss.

import { Controls } from "./controls.js";
import { Lines } from "./lines.js";
import { formula, number } from "./mathematics.js";
import { Picture, drawLosses } from "./pictures.js";
import { meanSquare } from "./samplers.js";

const SWEEP = 50; // times of the curve

export class LossPanel {
  constructor(panel, { engine, alphaBar, digits, timed }) {
    Object.assign(this, { panel, engine, digits, timed });
    this.T = alphaBar.length - 1;
    this.find = (name) => panel.querySelector(`[data-${name}]`);
    this.lines = new Lines(this.find("lines"));
    this.losses = new Map(); // t -> loss
    const names = [
      ["x_t", "the digit with noise"],
      ["ε", "the noise that was added"],
      ["ε̂", "the noise that the network sees"],
      ["ε-ε̂", "the difference, its error"],
    ];
    this.pictures = names.map(([symbol, text]) => {
      const caption = `<span class="symbol">${formula(symbol)}</span> ${text}`;
      return new Picture(this.find("pictures"), caption, text);
    });
    this.controls = new Controls(panel.querySelector("form"), () => {
      this.losses.clear();
      this.start();
    });
    this.slider = this.find("t");
    this.slider.addEventListener("input", () => this.start());
  }

  open() {
    this.start();
  }

  close() {}

  get t() {
    return Number(this.slider.value);
  }

  /** Measures the chosen time first, then what the curve still lacks. */
  start() {
    this.find("time").textContent = this.t;
    const sweep = Array.from({ length: SWEEP }, (_, i) =>
      Math.max(1, Math.round((i * this.T) / (SWEEP - 1))),
    );
    return this.measure([this.t, ...sweep.filter((t) => !this.losses.has(t))]);
  }

  async measure(times) {
    const { image, label, seed } = this.controls.values;
    const digit = Number(image);
    const options = { image: this.digits[digit], label: label === "right" ? digit : label, seed };
    const done = await this.engine.run("loss", { ...options, times }, (result) => {
      const loss = meanSquare(result.eps, result.epsHat);
      this.losses.set(result.t, loss);
      if (result.t === this.t) this.show(result, loss);
      drawLosses(this.find("chart"), this.losses, this.t, this.T);
    });
    this.timed(done);
  }

  show({ t, alphaT, xt, eps, epsHat }, loss) {
    const [first, second, third, fourth] = this.pictures;
    first.image(xt);
    second.noise(eps);
    third.noise(epsHat);
    fourth.noise(eps.map((value, i) => value - epsHat[i]));
    this.lines.show([
      {
        math: "x_t=√{ᾱ_t} x_0+√{1-ᾱ_t} ε",
        key: "Ho20 Eq. 4",
        numbers: `${number(Math.sqrt(alphaT))} · ${formula("x_0")} +
          ${number(Math.sqrt(1 - alphaT))} · ${formula("ε")}`,
        mirror: "q_sample",
      },
      {
        math: "ε̂=ε̂(x_t, t)",
        key: "the network",
        numbers: `at t = ${t}`,
        mirror: "eps_hat",
      },
      {
        math: "loss=mean of (ε-ε̂)^2",
        key: "Ho20 Eq. 14",
        numbers: `${number(loss)}; a network that always answers 0 has
          ${number(meanSquare(eps, new Float32Array(eps.length)))}`,
        mirror: "loss",
      },
    ]);
  }
}
