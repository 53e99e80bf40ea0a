// The third panel: samples from points between two noises, on the arc and on the straight line.

import { Controls } from "./controls.js";
import { Lines } from "./lines.js";
import { formula, number } from "./mathematics.js";
import { Picture, element } from "./pictures.js";
import { relativeLength, slerp } from "./samplers.js";

const COLUMNS = 9;
const ROWS = ["On the arc (slerp)", "On the straight line"];

export class BetweenPanel {
  constructor(panel, { engine, timed }) {
    Object.assign(this, { panel, engine, timed });
    this.find = (name) => panel.querySelector(`[data-${name}]`);
    this.lines = new Lines(this.find("lines"));
    this.pictures = ROWS.flatMap((name) => makeRow(this.find("rows"), name, COLUMNS, true));
    this.controls = new Controls(panel.querySelector("form"), () => this.start());
    this.column = this.find("column");
    this.column.addEventListener("input", () => this.show());
  }

  open() {
    if (!this.finished) this.start();
  }

  close() {}

  async start() {
    const { first, second, label, steps } = this.controls.values;
    this.finished = false;
    const options = { seeds: [first, second], columns: COLUMNS, label, guidance: 1, steps };
    const done = await this.engine.run("between", options, (result) => {
      if (result.ends) {
        this.ends = result.ends;
        result.starts.forEach((start, i) => this.pictures[i].image(start));
        this.pictures.forEach(({ caption }, i) => {
          caption.textContent = relativeLength(result.starts[i]).toFixed(2);
        });
        this.show();
      } else {
        this.pictures[result.index].image(result.x0);
      }
    });
    this.finished = done !== null;
    this.timed(done);
  }

  show() {
    const column = Number(this.column.value);
    const f = column / (COLUMNS - 1);
    this.find("fraction").textContent = f;
    this.pictures.forEach(({ figure }, i) => {
      figure.classList.toggle("chosen", i % COLUMNS === column);
    });
    if (!this.ends) return;
    const { theta, a, b, value } = slerp(...this.ends, f);
    const line = this.ends[0].map((x, i) => (1 - f) * x + f * this.ends[1][i]);
    const length = (x) => `, length ${number(relativeLength(x))}`;
    const mix = (one, two) => `${number(one)} · ${formula("x")} + ${number(two)} · ${formula("y")}`;
    this.lines.show([
      {
        math: "θ=the angle between x and y",
        key: "Song21 Appendix D.5",
        numbers: `${number((theta * 180) / Math.PI)}°: two independent noises are nearly at right
          angles`,
        mirror: "theta",
      },
      {
        math: "\\frac{sin((1-f)θ)}{sin θ} x+\\frac{sin(fθ)}{sin θ} y",
        key: "the arc",
        numbers: mix(a, b) + length(value),
        mirror: "arc",
      },
      {
        math: "(1-f) x+f y",
        key: "the straight line",
        numbers: mix(1 - f, f) + length(line),
        mirror: "line",
      },
    ]);
  }
}

/** A row of pictures under a heading. thin: every second one is hidden on a narrow screen. */
export function makeRow(parent, name, columns, thin = false) {
  const row = element("div", { className: thin ? "row thin" : "row" });
  row.style.setProperty("--columns", columns);
  parent.append(element("h3", {}, name), row);
  return Array.from({ length: columns }, (_, i) =>
    new Picture(row, thin ? "&nbsp;" : "", `${name}, picture ${i + 1} of ${columns}`),
  );
}
