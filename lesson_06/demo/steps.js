// What one step of the sampler computes: its lines, with the numbers of one pixel.

import { formula, number, operand } from "./mathematics.js";

/** The lines of a step for the list of lines. i: the pixel, 0 to 783. */
export function describe(step, options, i) {
  const lines = [describeEstimate(step, options, i), describeImage(step, i)];
  if (options.clip) lines.push(describeClipping(step, i));
  return [...lines, describeDeviation(step, options), describeMix(step, i)];
}

function describeEstimate({ t, estimate }, { label, guidance }, i) {
  const { eps, cond, null: none } = estimate;
  if (!cond) {
    return {
      id: "eps",
      math: `ε̂=ε̂(x_t, t, ${label === null || guidance === 0 ? "∅" : "c"})`,
      key: "the network",
      numbers: `at t = ${t}: ${number(eps[i])}`,
      mirror: "cond",
    };
  }
  return {
    id: "eps",
    math: "ε̂=ε̂(x_t, t, ∅)+s (ε̂(x_t, t, c)-ε̂(x_t, t, ∅))",
    key: "HoSalimans22 Eq. 6",
    numbers: `at t = ${t}: ${number(none[i])} + ${guidance} (${number(cond[i])} −
      ${operand(none[i])}) = ${number(eps[i])}`,
    mirror: "guided",
  };
}

function describeImage({ xt, estimate, raw, alphaT }, i) {
  const [signal, noise] = [Math.sqrt(alphaT), Math.sqrt(1 - alphaT)].map(number);
  return {
    id: "x0",
    math: "x̂_0=\\frac{x_t-√{1-ᾱ_t} ε̂}{√{ᾱ_t}}",
    key: "Song21 Eq. 9",
    numbers: `(${number(xt[i])} − ${noise} · ${operand(estimate.eps[i])}) / ${signal} =
      ${number(raw[i])}`,
    mirror: "x0",
  };
}

function describeClipping({ xt, x0, eps, alphaT }, i) {
  const [signal, noise] = [Math.sqrt(alphaT), Math.sqrt(1 - alphaT)].map(number);
  return {
    id: "clip",
    math: "x̂_0<clip(x̂_0),  ε̂<\\frac{x_t-√{ᾱ_t} x̂_0}{√{1-ᾱ_t}}",
    numbers: `${formula("x̂_0")} = ${number(x0[i])}, ${formula("ε̂")} = (${number(xt[i])} −
      ${signal} · ${operand(x0[i])}) / ${noise} = ${number(eps[i])}`,
    mirror: "clip",
  };
}

function describeDeviation({ alphaT, alphaS, sigma }, { eta }) {
  return {
    id: "sigma",
    math: "σ=η√{(1-ᾱ_s)/(1-ᾱ_t)}√{1-ᾱ_t/ᾱ_s}",
    key: "Song21 Eq. 16",
    numbers: `${number(eta)} · √(${number(1 - alphaS)} / ${number(1 - alphaT)}) ·
      √(1 − ${number(alphaT)} / ${number(alphaS)}) = ${number(sigma)}`,
    mirror: "sigma",
  };
}

function describeMix({ x0, eps, xs, z, alphaS, sigma, epsCoef }, i) {
  const fresh = z === null ? "" : ` + ${number(sigma)} · ${operand(z[i])}`;
  return {
    id: "step",
    math: `x_s=√{ᾱ_s} x̂_0+√{1-ᾱ_s-σ^2} ε̂${z === null ? "" : "+σ z"}`,
    key: "Song21 Eq. 12",
    numbers: `${number(Math.sqrt(alphaS))} · ${operand(x0[i])} + ${number(epsCoef)} ·
      ${operand(eps[i])}${fresh} = ${number(xs[i])}`,
    mirror: z === null ? "mean" : "noise",
  };
}

/** The command that draws the same digit with PyTorch. */
export function command({ label, guidance, steps, eta, spacing, clip, seed }) {
  const asked = label === null ? "" : ` --prompts ${label} --guidance ${guidance}`;
  const name = label === null ? "unconditional" : "conditional";
  return (
    "python lesson_06/sample_ddim.py" +
    " --model_checkpoint lesson_05/class_conditional/pretrained/mnist.safetensors" +
    `${asked} --num_steps ${steps} --eta ${eta} --spacing ${spacing} --clip_x0 ${clip}` +
    ` --seed ${seed} --num_samples 1 --device cpu --precision float32` +
    `\n# the picture is lesson_06/output/${name}.png`
  );
}
