// The page: its data, the worker, the tabs.

import { BetweenPanel } from "./between.js";
import { BreakPanel } from "./breaking.js";
import { fromBase64 } from "./checkpoint.js";
import { DenoisePanel } from "./denoise.js";
import { DigitPanel } from "./digit.js";
import { Engine } from "./engine.js";
import { LossPanel } from "./losses.js";

const PANELS = {
  denoise: DenoisePanel,
  digit: DigitPanel,
  between: BetweenPanel,
  break: BreakPanel,
  loss: LossPanel,
};
const NUM_PIXELS = 784;

const text = (id) => document.getElementById(id).textContent;

/** The ten test digits, each 784 numbers in [-1, 1]. */
function readDigits() {
  const bytes = fromBase64(text("digits"));
  const levels = (digit) => bytes.subarray(digit * NUM_PIXELS, (digit + 1) * NUM_PIXELS);
  return Array.from({ length: 10 }, (_, digit) =>
    Float32Array.from(levels(digit), (level) => level / 127.5 - 1),
  );
}

function say(words) {
  document.querySelector("[data-speed-of-network]").textContent = words;
}

/** Says in the footer how quick the network was. */
function timed(done) {
  if (!done?.passes) return;
  const { milliseconds, passes } = done;
  const each = milliseconds / passes;
  say(
    `The network ran ${passes} ${passes === 1 ? "time" : "times"}, ` +
      `${each.toFixed(each < 10 ? 1 : 0)} ms each on this machine.`,
  );
}

/** A click opens a tab's panel; the arrows go from tab to tab. */
function listen(tabs, open) {
  for (const [i, tab] of tabs.entries()) {
    tab.addEventListener("click", () => {
      const name = tab.getAttribute("aria-controls");
      history.replaceState(null, "", `#show=${name}`);
      open(name);
    });
    tab.addEventListener("keydown", ({ key }) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[key];
      if (!by) return;
      const next = tabs[(i + by + tabs.length) % tabs.length];
      next.focus();
      next.click();
    });
  }
}

function start() {
  const context = {
    engine: new Engine(text, (message) =>
      say(`The network cannot run in this browser (${message}): try a current one.`),
    ),
    alphaBar: new Float64Array(fromBase64(text("alpha-bar")).buffer),
    digits: readDigits(),
    timed,
  };
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const panels = new Map();
  for (const [id, Panel] of Object.entries(PANELS)) {
    panels.set(id, new Panel(document.getElementById(id), context));
  }

  function open(name) {
    for (const tab of tabs) {
      const id = tab.getAttribute("aria-controls");
      const chosen = id === name;
      tab.setAttribute("aria-selected", chosen);
      tab.tabIndex = chosen ? 0 : -1;
      document.getElementById(id).hidden = !chosen;
      if (!chosen) panels.get(id).close();
    }
    panels.get(name).open();
  }

  listen(tabs, open);
  const wanted = location.hash.replace("#show=", ""); // not an id, so that nothing scrolls
  open(wanted in PANELS ? wanted : "denoise");
}

start();
