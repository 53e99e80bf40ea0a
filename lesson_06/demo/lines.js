// The lines of code that run: equation, the same with numbers, and the line in Python.

import { formula } from "./mathematics.js";
import { element } from "./pictures.js";

/** name -> { file, line, code }: what the page mirrors; the build looks the lines up. */
const MIRRORS = JSON.parse(globalThis.document?.getElementById("mirrors").textContent ?? "{}");

/** The line of Python under this name, as HTML. gone: struck out. */
function python(name, gone = false) {
  const { file, line, code } = MIRRORS[name];
  const text = element("code", { textContent: code, className: gone ? "gone" : "" });
  return `${text.outerHTML}<span>${file}, line ${line}</span>`;
}

export class Lines {
  constructor(list) {
    this.list = list;
  }

  /** lines: { math, key, numbers, mirror, gone }. numbers and gone may be left out. */
  show(lines, active = -1) {
    lines.forEach((line, i) => this.fill(this.item(i), line, i === active));
    while (this.list.children.length > lines.length) this.list.lastChild.remove();
  }

  item(i) {
    if (!this.list.children[i]) {
      const parts = ["formula", "numbers", "python"].map((className) =>
        element("div", { className }),
      );
      const item = element("li");
      item.append(...parts);
      this.list.append(item);
    }
    return this.list.children[i];
  }

  fill(item, { math, key = "", numbers = "", mirror, gone }, active) {
    item.className = active ? "active" : "";
    const [left, right, below] = item.children;
    const html = `${formula(math)} <span class="key">${key && `[${key}]`}</span>`;
    if (left.dataset.math !== html) left.innerHTML = left.dataset.math = html;
    right.innerHTML = numbers;
    const source = (gone ? python(gone, true) : "") + python(mirror);
    if (below.dataset.source !== source) below.innerHTML = below.dataset.source = source;
  }
}
