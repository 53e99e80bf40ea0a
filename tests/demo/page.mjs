// The built page in a browser: node page.mjs DEMO.HTML VECTORS.JSON BROWSER [SCREENSHOT.PNG]
// Run from a folder in which playwright-core and axe-core are installed.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [file, vectors, executablePath, screenshot] = process.argv.slice(2);
const require = createRequire(`${process.cwd()}/`);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const expected = JSON.parse(readFileSync(vectors, "utf8"));
const address = pathToFileURL(file).href;
const PANELS = ["denoise", "digit", "between", "break", "loss"];
const WIDTHS = [360, 800, 1600];

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });

/** Opens a panel in a page of its own; errors and requests of the page are failures. */
async function open(panel, { width = 1280, height = 900, ...options } = {}) {
  const page = await browser.newPage({ viewport: { width, height }, ...options });
  page.failures = [];
  page.on("pageerror", (error) => page.failures.push(error.stack));
  page.on("request", (request) => {
    if (!/^(file|data|blob):/.test(request.url())) page.failures.push(request.url());
  });
  await page.goto(`${address}#show=${panel}`);
  return page;
}

async function close(page) {
  assert.deepEqual(page.failures, []);
  await page.close();
}

/** Waits until the footer says how often the network ran. */
const finished = (page, passes) =>
  page.waitForFunction(
    (text) => document.querySelector("[data-speed-of-network]").textContent.startsWith(text),
    `The network ran ${passes} time`,
    { timeout: 120_000 },
  );

/** Empties the footer's line, so that the next job can be told from the last. */
const forget = (page) =>
  page.evaluate(() => {
    document.querySelector("[data-speed-of-network]").textContent = "";
  });

/** The grey levels of the nth picture of a panel. */
const levels = (page, panel, n) =>
  page.evaluate(
    ([panel, n]) => {
      const canvas = document.querySelectorAll(`#${panel} .pictures canvas`)[n];
      const { data } = canvas.getContext("2d").getImageData(0, 0, 28, 28);
      return Array.from({ length: 784 }, (_, i) => data[4 * i]);
    },
    [panel, n],
  );

async function set(page, name, value) {
  const input = page.locator(`#denoise [name=${name}]`);
  const kind = await input.evaluate((element) => element.type);
  if (kind === "checkbox") return input.setChecked(value);
  if (kind === "select-one") return input.selectOption(String(value ?? "none"));
  if (!(await input.isDisabled())) await input.fill(String(value));
}

/** How often the network runs for these settings. */
const passes = ({ label, guidance, steps }) =>
  steps * (label === null || guidance === 0 || guidance === 1 ? 1 : 2);

const level = (value) => Math.round(Math.min(Math.max(value, -1), 1) * 127.5 + 127.5);

const checks = {
  async "draws what Python draws, to a grey level"() {
    const page = await open("denoise", { reducedMotion: "reduce" });
    for (const [options, image] of expected.denoise) {
      for (const [name, value] of Object.entries(options)) await set(page, name, value);
      await forget(page);
      await page.locator("#denoise [name=seed]").dispatchEvent("input"); // once more, from the start
      await finished(page, passes(options));
      await page.waitForTimeout(100);
      const drawn = await levels(page, "denoise", 3);
      const worst = Math.max(...drawn.map((value, i) => Math.abs(value - level(image[i]))));
      assert.ok(worst <= 1, `${JSON.stringify(options)}: ${worst} grey levels`);
    }
    await close(page);
  },

  async "S = 20 with guidance takes at most 3 s"() {
    const page = await open("denoise", { reducedMotion: "reduce" });
    await finished(page, 40);
    const times = [];
    for (const seed of ["5", "6", "7"]) {
      await forget(page);
      const began = Date.now();
      await page.locator("#denoise [name=seed]").fill(seed);
      await finished(page, 40);
      times.push((Date.now() - began) / 1000);
    }
    const seconds = Math.min(...times); // other work on the machine makes single times longer
    console.log(`      ${times.map((time) => time.toFixed(2)).join(", ")} s`);
    assert.ok(seconds <= 3);
    await close(page);
  },

  async "a moved slider interrupts, and the page never waits"() {
    const page = await open("denoise", { reducedMotion: "reduce" });
    await finished(page, 40);
    await page.evaluate(() => {
      globalThis.longest = 0;
      let before = performance.now();
      const frame = (now) => {
        globalThis.longest = Math.max(globalThis.longest, now - before);
        before = now;
        requestAnimationFrame(frame);
      };
      requestAnimationFrame(frame);
    });
    for (const steps of [100, 90, 80, 70, 13]) await set(page, "steps", steps);
    await finished(page, 26);
    const longest = await page.evaluate(() => globalThis.longest);
    console.log(`      longest frame ${longest.toFixed(0)} ms`);
    assert.ok(longest < 1000);
    await close(page);
  },

  async "the keyboard plays, steps and changes panels"() {
    const page = await open("denoise", { reducedMotion: "reduce" });
    await finished(page, 40);
    const step = page.locator("#denoise [data-step]");
    const play = page.locator("#denoise [data-do=play]");
    assert.equal(await play.textContent(), "Play"); // reduced motion: it does not start by itself
    await page.keyboard.press("Home");
    assert.match(await step.textContent(), /^1 of 20: from t = 951/);
    await page.keyboard.press("ArrowRight");
    assert.match(await step.textContent(), /^2 of 20/);
    await page.keyboard.press("Space");
    assert.equal(await play.textContent(), "Pause");
    await page.keyboard.press("End");
    assert.match(await step.textContent(), /^20 of 20: from t = 1 to s = 0/);
    assert.equal(await play.textContent(), "Play");
    await page.locator("#tab-denoise").focus();
    await page.keyboard.press("ArrowRight");
    assert.ok(await page.locator("#digit").isVisible());
    await page.keyboard.press("ArrowLeft");
    assert.ok(await page.locator("#denoise").isVisible());
    await close(page);
  },

  async "play shows every line in its turn"() {
    const page = await open("denoise", { reducedMotion: "reduce" });
    await finished(page, 40);
    await page.keyboard.press("Home");
    await page.locator("#denoise [data-do=line]").click();
    const now = page.locator("[data-now] .python");
    const seen = [];
    for (let i = 0; i < 5; i++) {
      seen.push(await now.textContent());
      await page.locator("#denoise [data-do=line]").click();
    }
    assert.equal(new Set(seen).size, 5);
    assert.match(seen[0], /guidance\.py, line \d+$/);
    assert.match(seen[4], /ddim\.py, line \d+$/);
    await close(page);
  },

  async "a drawing is restored, with the mouse and with the keyboard"() {
    const page = await open("digit");
    await page.locator("#digit [data-do=clear]").click();
    const pad = page.locator("#digit .pad canvas");
    const box = await pad.boundingBox();
    await page.mouse.move(box.x + box.width / 2, box.y + 30);
    await page.mouse.down();
    await page.mouse.move(box.x + box.width / 2 - 20, box.y + box.height - 30, { steps: 8 });
    await page.mouse.up();
    await page.waitForFunction(() => /^Done/.test(document.querySelector("#digit .result").textContent));
    assert.ok((await levels(page, "digit", 1)).filter((value) => value > 200).length > 20);
    assert.ok((await levels(page, "digit", 3)).filter((value) => value > 200).length > 10);
    await page.locator("#digit [data-do=clear]").click();
    await pad.focus();
    await page.keyboard.press("Space");
    for (let i = 0; i < 12; i++) await page.keyboard.press("ArrowDown");
    await page.waitForFunction(() => /^Done/.test(document.querySelector("#digit .result").textContent));
    assert.ok((await levels(page, "digit", 1)).filter((value) => value > 200).length > 20);
    await page.check("#digit-encode");
    await page.waitForFunction(() => /^Done/.test(document.querySelector("#digit .result").textContent));
    await close(page);
  },

  async "a finger draws"() {
    const page = await open("digit", { hasTouch: true, isMobile: true, width: 360, height: 740 });
    await page.locator("#digit [data-do=clear]").tap();
    await page.locator("#digit .pad canvas").tap();
    await page.waitForFunction(() => /^Done/.test(document.querySelector("#digit .result").textContent));
    await close(page);
  },

  async "every break and every loss arrives"() {
    const page = await open("break");
    for (const [what, runs] of [["late", 300], ["clipping", 240], ["number", 300], ["silent", 300]]) {
      await page.check(`#break-${what}`);
      await finished(page, runs);
    }
    await page.locator("#tab-between").click();
    await finished(page, 360);
    await page.locator("#tab-loss").click();
    await finished(page, 51);
    assert.equal(await page.locator("#loss .lines li").count(), 3);
    await close(page);
  },

  async "axe finds nothing; no small text, nothing too wide"() {
    for (const colorScheme of ["light", "dark"]) {
      for (const width of WIDTHS) {
        for (const panel of PANELS) await inspect(panel, { colorScheme, width });
      }
    }
  },
};

async function inspect(panel, options) {
  const page = await open(panel, { ...options, reducedMotion: "reduce" });
  await page.waitForTimeout(1000);
  await page.evaluate(() => document.querySelectorAll("details").forEach((part) => (part.open = true)));
  await page.evaluate(axe);
  const found = await page.evaluate(async () => {
    const { violations } = await globalThis.axe.run(document);
    const text = (element) =>
      [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const small = [...document.querySelectorAll("body *")].filter(
      (element) =>
        element.checkVisibility() && text(element) && parseFloat(getComputedStyle(element).fontSize) < 14,
    );
    return {
      violations: violations.map(({ id, nodes }) => `${id}: ${nodes[0].html}`),
      small: small.map((element) => element.outerHTML),
      width: document.documentElement.scrollWidth,
    };
  });
  const where = `${panel}, ${options.width} pixels, ${options.colorScheme}`;
  assert.deepEqual(found, { violations: [], small: [], width: options.width }, where);
  await close(page);
}

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok    ${name}`);
  } catch (error) {
    failed++;
    console.log(`FAIL  ${name}: ${error.message}`);
  }
}
if (screenshot) {
  const page = await open("denoise", { width: 1200, height: 852, reducedMotion: "reduce" });
  await finished(page, 40);
  await page.keyboard.press("Home");
  for (let i = 0; i < 7; i++) await page.keyboard.press("ArrowRight");
  await page.locator("#pixel-row").fill("9");
  await page.locator("#pixel-column").fill("19");
  await page.evaluate(() => scrollTo(0, 0));
  await page.screenshot({ path: screenshot });
  await page.close();
}
console.log(`${browser.version()}: ${failed} of ${Object.keys(checks).length} failed`);
await browser.close();
process.exit(failed ? 1 : 0);
