// The first panel: one digit, every step, every line.

import { Controls, onClick } from "./controls.js";
import { Lines } from "./lines.js";
import { formula } from "./mathematics.js";
import { Picture, drawSchedule, element, markTime } from "./pictures.js";
import { ddimTimesteps } from "./samplers.js";
import { command, describe } from "./steps.js";

const STRIP = 10; // small pictures
const MILLISECONDS = { lines: 1200, normal: 200, fast: 50 }; // a line, or a step
const WIDTH_OF_IMAGE = 28;
const PICTURE_OF_LINE = { eps: 1, x0: 2, clip: 2, step: 3 };

export class DenoisePanel {
  constructor(panel, { engine, alphaBar, timed }) {
    Object.assign(this, { panel, engine, alphaBar, timed });
    this.find = (name) => panel.querySelector(`[data-${name}]`);
    this.steps = []; // what the sampler computed so far
    this.wanted = 1; // the place on the way that is shown, from 0 to 1
    this.line = 0; // the line that is being executed
    this.lines = new Lines(this.find("lines"));
    this.now = new Lines(this.find("now"));
    this.pixel = new Pixel(this.find("pixel"), () => this.show());
    this.makePictures();
    this.find("all-lines").open = matchMedia("(min-width: 960px)").matches;
    this.controls = new Controls(panel.querySelector("form"), () => this.start());
    onClick(panel, {
      play: () => (this.timer ? this.pause() : this.play()),
      back: () => this.move(-1),
      step: () => this.move(1),
      line: () => this.nextLine(),
      copy: () => this.copy(),
    });
    this.scrub = this.find("scrub");
    this.scrub.addEventListener("input", () => this.goTo(Number(this.scrub.value)));
    document.addEventListener("keydown", (event) => this.key(event));
  }

  makePictures() {
    const names = [
      ["x_t", "the noisy image"],
      ["ε̂", "the noise that the network sees in it"],
      ["x̂_0", "the clean image that this implies"],
      ["x_s", "the next image, with less noise"],
    ];
    this.pictures = names.map(([symbol, text]) => {
      const caption = `<span class="symbol">${formula(symbol)}</span> ${text}`;
      const picture = new Picture(this.find("pictures"), caption, text);
      picture.cross = element("div", { className: "cross", hidden: true });
      picture.frame.append(picture.cross);
      picture.frame.addEventListener("pointerdown", (event) => this.pixel.pick(event));
      return picture;
    });
    this.strip = Array.from({ length: STRIP }, (_, i) => {
      const button = element("button", { type: "button" });
      const picture = new Picture(button);
      picture.canvas.removeAttribute("role");
      picture.canvas.setAttribute("aria-hidden", "true");
      button.append((picture.time = element("span")));
      button.addEventListener("click", () => this.goTo(this.stripStep(i)));
      this.find("strip").append(button);
      return Object.assign(picture, { button });
    });
  }

  /** The panel comes into view. */
  open() {
    if (this.steps.length < this.options?.steps || !this.options) {
      const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
      this.start();
      if (!still) this.play();
    }
  }

  close() {
    this.pause();
  }

  async start() {
    this.options = this.controls.values;
    const { label, steps, spacing } = this.options;
    this.panel.querySelector("[name=guidance]").disabled = label === null;
    this.times = ddimTimesteps(this.alphaBar.length - 1, steps, spacing);
    this.steps = [];
    this.scrub.max = steps - 1;
    drawSchedule(this.find("schedule"), this.alphaBar, this.times, {
      signal: `<b>share of the image</b> ${formula("√{ᾱ_t}")}`,
      noise: `<b>share of the noise</b> ${formula("√{1-ᾱ_t}")}`,
    });
    this.find("command").textContent = command(this.options);
    this.showStrip();
    const done = await this.engine.run("denoise", this.options, (step) => {
      this.steps.push(step);
      this.showSoon();
    });
    this.timed(done);
  }

  /** The number of the step that is shown: the wanted one, or the last that is computed. */
  get position() {
    const wanted = Math.round(this.wanted * (this.options.steps - 1));
    return Math.min(wanted, this.steps.length - 1);
  }

  goTo(step) {
    this.pause();
    this.place(step);
    this.line = Infinity;
    this.show();
  }

  place(step) {
    const last = this.options.steps - 1;
    this.wanted = last ? Math.min(Math.max(step, 0), last) / last : 1;
  }

  move(by) {
    this.goTo(this.position + by);
  }

  nextLine() {
    this.pause();
    this.advanceLine();
    this.show();
  }

  advanceLine() {
    if (this.line < this.count - 1) {
      this.line++;
    } else if (this.position < this.options.steps - 1) {
      this.line = 0;
      this.place(this.position + 1);
    }
  }

  get atEnd() {
    return this.position === this.options.steps - 1 && this.line >= this.count - 1;
  }

  play() {
    const button = this.panel.querySelector("[data-do=play]");
    button.textContent = "Pause";
    if (!this.steps.length || this.atEnd) {
      this.place(0);
      this.line = 0;
    }
    const speed = this.find("speed");
    const tick = () => {
      if (speed.value === "lines") {
        this.advanceLine();
      } else {
        this.line = Infinity;
        if (this.steps.length) this.place(this.position + 1);
      }
      if (this.steps.length) this.show();
      this.timer = setTimeout(tick, MILLISECONDS[speed.value]);
      if (this.steps.length && this.atEnd) this.pause();
    };
    this.timer = setTimeout(tick, MILLISECONDS[speed.value]);
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
    this.panel.querySelector("[data-do=play]").textContent = "Play";
  }

  /** Space plays, the arrows step, where the key has no other meaning. */
  key(event) {
    const busy = event.target.closest("button, input, select, summary, pre");
    if (this.panel.hidden || busy || event.ctrlKey || event.metaKey || event.altKey) return;
    const actions = {
      " ": () => (this.timer ? this.pause() : this.play()),
      ArrowLeft: () => this.move(-1),
      ArrowRight: () => this.move(1),
      Home: () => this.goTo(0),
      End: () => this.goTo(this.options.steps - 1),
    };
    if (!(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  }

  stripStep(i) {
    return Math.round((i * (this.options.steps - 1)) / (STRIP - 1));
  }

  /** Shows at most once a frame: painting each step would slow the network down. */
  showSoon() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.show();
    });
  }

  show() {
    const step = this.steps[this.position];
    if (!step) return;
    const { row, column } = this.pixel;
    const lines = describe(step, this.options, row * WIDTH_OF_IMAGE + column);
    this.count = lines.length;
    const active = Math.min(this.line, lines.length - 1);
    this.lines.show(lines, active);
    this.now.show([lines[active]], 0);
    this.showPictures(step, lines, active);
    this.showStrip();
    this.scrub.value = this.position;
    const where = `${this.position + 1} of ${this.options.steps}`;
    this.scrub.setAttribute("aria-valuetext", `step ${where}, t = ${step.t}`);
    this.find("step").textContent = `${where}: from t = ${step.t} to s = ${step.s}`;
    markTime(this.find("schedule"), step.t, this.alphaBar.length - 1);
  }

  showPictures(step, lines, active) {
    const [xt, eps, x0, xs] = this.pictures;
    const clipped = lines.findIndex(({ id }) => id === "clip");
    const before = clipped >= 0 && active < clipped;
    xt.image(step.xt);
    eps.noise(before ? step.estimate.eps : step.eps);
    x0.image(before ? step.raw : step.x0, { outside: true });
    xs.image(step.xs);
    const lit = PICTURE_OF_LINE[lines[active].id];
    const first = (picture) => lines.findIndex(({ id }) => PICTURE_OF_LINE[id] === picture);
    this.pictures.forEach((picture, i) => {
      picture.frame.classList.toggle("active", i === lit);
      picture.frame.classList.toggle("pale", i > 0 && first(i) > active);
      picture.cross.hidden = false;
      picture.cross.style.left = `${(100 * this.pixel.column) / WIDTH_OF_IMAGE}%`;
      picture.cross.style.top = `${(100 * this.pixel.row) / WIDTH_OF_IMAGE}%`;
    });
  }

  showStrip() {
    this.strip.forEach((picture, i) => {
      const k = this.stripStep(i);
      const step = this.steps[k];
      picture.button.hidden = i > 0 && k === this.stripStep(i - 1);
      picture.button.setAttribute("aria-pressed", k === this.position);
      picture.time.textContent = `t ${this.times[this.times.length - 1 - k]}`;
      picture.button.disabled = !step;
      if (step && picture.shown !== step) picture.image(step.x0, { outside: true });
      picture.shown = step;
    });
  }

  async copy() {
    const text = this.find("command").textContent;
    try {
      await navigator.clipboard.writeText(text);
      this.find("copied").textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(this.find("command"));
      this.find("copied").textContent = "Selected: copy it with Ctrl+C or ⌘C.";
    }
  }
}

/** The pixel whose numbers are shown: two fields, or a point in a picture. */
class Pixel {
  constructor(box, changed) {
    Object.assign(this, { box, changed, row: 14, column: 14 });
    const field = (name) => `<label for="pixel-${name}">${name}</label>
      <input id="pixel-${name}" type="number" min="0" max="27" value="14" inputmode="numeric">`;
    box.className = "pixel";
    box.innerHTML = `${field("row")} ${field("column")}
      <span class="hint">or point at a picture</span>`;
    box.addEventListener("input", ({ target }) => {
      this[target.id.replace("pixel-", "")] = inside(Number(target.value));
      changed();
    });
  }

  /** The pixel under the pointer in a frame. */
  pick({ currentTarget, clientX, clientY }) {
    const { left, top, width, height } = currentTarget.getBoundingClientRect();
    this.row = inside(((clientY - top) / height) * WIDTH_OF_IMAGE);
    this.column = inside(((clientX - left) / width) * WIDTH_OF_IMAGE);
    for (const name of ["row", "column"]) {
      this.box.querySelector(`#pixel-${name}`).value = this[name];
    }
    this.changed();
  }
}

const inside = (value) => Math.min(Math.max(Math.floor(value), 0), WIDTH_OF_IMAGE - 1);
