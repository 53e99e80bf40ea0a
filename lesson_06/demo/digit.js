// The second panel: a drawing, noised and denoised, or encoded and decoded.

import { Controls, onClick } from "./controls.js";
import { SIZE_OF_IMAGE, centred } from "./drawing.js";
import { Lines } from "./lines.js";
import { formula, number } from "./mathematics.js";
import { Picture, element } from "./pictures.js";
import { imageError } from "./samplers.js";

const PAD = 280; // pixels of the drawing's canvas
const PEN = 22;
const KEY_STEP = PAD / SIZE_OF_IMAGE;
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class DigitPanel {
  constructor(panel, { engine, alphaBar, digits, timed }) {
    Object.assign(this, { panel, engine, alphaBar, digits, timed });
    this.find = (name) => panel.querySelector(`[data-${name}]`);
    this.lines = new Lines(this.find("lines"));
    this.makePictures();
    this.controls = new Controls(panel.querySelector("form"), () => this.start());
    this.example = this.find("example");
    this.example.addEventListener("input", () => this.take(this.digits[this.example.value]));
    onClick(panel, { clear: () => this.clear() });
    this.makePad();
    this.clear();
  }

  makePictures() {
    const parent = this.find("pictures");
    this.pad = new Picture(parent, "draw here: mouse, finger, or arrow keys and space");
    this.centred = new Picture(parent, `<span class="symbol">${formula("x_0")}</span> centred like
      MNIST: 28x28 pixels`, "the drawing, centred");
    this.middle = new Picture(parent, " ", "the noisy image");
    this.last = new Picture(parent, " ", "the restored image");
  }

  makePad() {
    const { canvas, frame } = this.pad;
    frame.classList.add("pad");
    canvas.width = canvas.height = PAD;
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", "Drawing. The arrow keys move the pen, space lowers or lifts it.");
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.key = { x: PAD / 2, y: PAD / 4, down: false };
    this.cross = element("div", { className: "cross", hidden: true });
    frame.append(this.cross);
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      const scale = PAD / box.width;
      return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
    };
    canvas.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      canvas.setPointerCapture(event.pointerId);
      this.from = at(event);
      this.stroke(this.from, this.from);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.from) return;
      const to = at(event);
      this.stroke(this.from, to);
      this.from = to;
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, () => {
        if (this.from) this.drawn();
        this.from = null;
      });
    }
    canvas.addEventListener("keydown", (event) => this.press(event));
    canvas.addEventListener("blur", () => (this.cross.hidden = true));
  }

  press(event) {
    const { key } = this;
    if (event.key === " ") {
      key.down = !key.down;
      if (key.down) this.stroke(key, key);
    } else if (event.key in MOVES) {
      const [dx, dy] = MOVES[event.key];
      const inside = (value) => Math.min(Math.max(value, KEY_STEP), PAD - KEY_STEP);
      const to = { x: inside(key.x + dx * KEY_STEP), y: inside(key.y + dy * KEY_STEP) };
      if (key.down) this.stroke(key, to);
      Object.assign(key, to);
    } else {
      return;
    }
    event.preventDefault();
    this.cross.hidden = false;
    this.cross.style.left = `${(100 * key.x) / PAD - 50 / SIZE_OF_IMAGE}%`;
    this.cross.style.top = `${(100 * key.y) / PAD - 50 / SIZE_OF_IMAGE}%`;
    this.drawn();
  }

  stroke(from, to) {
    const { context } = this;
    Object.assign(context, { lineWidth: PEN, lineCap: "round", strokeStyle: "#fff" });
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x, to.y + 0.01);
    context.stroke();
  }

  clear() {
    this.context.fillStyle = "#000";
    this.context.fillRect(0, 0, PAD, PAD);
    this.key.down = false;
    this.example.value = "";
    this.image = null;
    this.engine.run("stop");
    for (const picture of [this.centred, this.middle, this.last]) {
      picture.image(new Float32Array(SIZE_OF_IMAGE ** 2).fill(-1));
    }
    this.start();
  }

  /** The drawing has changed. */
  drawn() {
    const { data } = this.context.getImageData(0, 0, PAD, PAD);
    const ink = Float32Array.from({ length: PAD * PAD }, (_, i) => data[4 * i] / 255);
    const image = centred(ink, PAD);
    if (!image) return;
    this.example.value = "";
    this.image = image;
    this.start();
  }

  /** Shows a test digit in place of a drawing. */
  take(digit) {
    if (!digit) return;
    const small = element("canvas", { width: SIZE_OF_IMAGE, height: SIZE_OF_IMAGE });
    const picture = small.getContext("2d").createImageData(SIZE_OF_IMAGE, SIZE_OF_IMAGE);
    digit.forEach((value, i) => {
      const grey = value * 127.5 + 127.5;
      picture.data.set([grey, grey, grey, 255], 4 * i);
    });
    small.getContext("2d").putImageData(picture, 0, 0);
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(small, 0, 0, PAD, PAD);
    this.image = digit;
    this.start();
  }

  open() {
    if (!this.image) {
      this.example.value = "5";
      this.take(this.digits[5]);
    } else {
      this.start();
    }
  }

  close() {}

  async start() {
    const options = (this.options = { ...this.controls.values, spacing: "trailing" });
    const walk = options.mode === "walk";
    for (const field of this.panel.querySelectorAll("[data-only=walk]")) field.hidden = !walk;
    this.caption(this.middle, walk ? "x_t" : "x_T", walk ? "with noise" : "encoded as noise");
    this.caption(this.last, "x̂_0", walk ? "denoised" : "decoded again");
    this.show(null);
    if (!this.image || this.panel.hidden) return;
    this.centred.image(this.image);
    const job = walk ? "walkBack" : "encode";
    const done = await this.engine.run(job, { ...options, image: this.image }, (result) =>
      this.show(result),
    );
    this.timed(done);
  }

  caption(picture, symbol, text) {
    picture.caption.innerHTML = `<span class="symbol">${formula(symbol)}</span> ${text}`;
    picture.describe(text);
  }

  show(result) {
    const { mode, t } = this.options;
    const text = this.find("result");
    if (result === null) {
      text.textContent = "";
    } else if (result.start) {
      this.middle.image(result.start);
    } else if (result.encoding) {
      this.middle.image(result.encoding.xs);
      text.textContent = `Encoding: t = ${result.encoding.t}`;
    } else {
      this.last.image(result.x0);
      const error = imageError(result.x0, this.image);
      text.innerHTML = `${result.s === 0 ? "Done" : `t = ${result.s}`}. Mean squared difference from
        your digit, pixels in [0, 1]: ${number(error)}`;
    }
    this.lines.show(mode === "walk" ? this.walkLines(t, result) : encodeLines(result, this.image));
  }

  walkLines(t, result) {
    const alphaT = this.alphaBar[t];
    const active = result && !result.start;
    return [
      {
        math: "x_t=√{ᾱ_t} x_0+√{1-ᾱ_t} ε",
        key: "Ho20 Eq. 4",
        numbers: `t = ${t}: ${number(Math.sqrt(alphaT))} · ${formula("x_0")} +
          ${number(Math.sqrt(1 - alphaT))} · ${formula("ε")}`,
        mirror: "q_sample",
      },
      {
        math: "x_s=√{ᾱ_s} x̂_0+√{1-ᾱ_s-σ^2} ε̂+σ z",
        key: "Song21 Eq. 12",
        numbers: active ? stepNumbers(result) : "",
        mirror: "sample_step",
      },
    ];
  }
}

const stepNumbers = ({ t, s, alphaS, epsCoef, sigma }) => `from ${t} to ${s}:
  ${number(Math.sqrt(alphaS))} · ${formula("x̂_0")} + ${number(epsCoef)} · ${formula("ε̂")} +
  ${number(sigma)} · ${formula("z")}`;

function encodeLines(result, image) {
  const { encoding } = result ?? {};
  const decoding = result && !encoding;
  return [
    {
      math: "ε̂=ε̂(x_s, s)",
      key: "the network",
      numbers: encoding ? `at s = ${Math.max(encoding.s, 1)}` : "",
      mirror: "encode_time",
    },
    {
      math: "x_t=√{ᾱ_t} x̂_0+√{1-ᾱ_t} ε̂",
      key: "Song21 Eq. 13",
      numbers: encoding ? `up, from ${encoding.s} to ${encoding.t}` : "",
      mirror: "encode_step",
    },
    {
      math: "x_s=√{ᾱ_s} x̂_0+√{1-ᾱ_s} ε̂",
      key: "Song21 Eq. 12, η = 0",
      numbers: decoding ? `down, from ${result.t} to ${result.s}` : "",
      mirror: "sample_step",
    },
    {
      math: "mean of (x̂_0-x_0)^2",
      key: "Song21 Section 5.4",
      numbers: decoding ? `${number(imageError(result.x0, image))}, pixels in [0, 1]` : "",
      mirror: "error",
    },
  ];
}
