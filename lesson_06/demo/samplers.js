// lesson_06/ddim.py and what it needs of lesson 5: the samplers, in numbers that the page can show.
//
// An image or a noise is a Float32Array of 784 numbers. alphaBar[t] is ᾱ_t, for t = 0 to T.
// predict(xt, t) returns { eps } and, with guidance, the two estimates { cond, null } it is made of.

/** lesson_05/guidance.py: ε̂ = ε̂(∅) + s (ε̂(c) - ε̂(∅)). label null: without a digit. */
export function guided(network, label, scale) {
  const estimate = (xt, t, of) => network.predict(xt, t, of);
  if (label === null || scale === 0) {
    return (xt, t) => ({ eps: estimate(xt, t, network.nullLabel) });
  }
  if (scale === 1) return (xt, t) => ({ eps: estimate(xt, t, label) });
  return (xt, t) => {
    const cond = estimate(xt, t, label);
    const none = estimate(xt, t, network.nullLabel);
    return { eps: none.map((value, i) => value + scale * (cond[i] - value)), cond, null: none };
  };
}

/** Rounded; halves go to the even neighbour, as in Python. */
function round(value) {
  const floor = Math.floor(value);
  if (value - floor !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}

/** ddim_timesteps: the times τ_1 < ... < τ_S of the network's evaluations. */
export function ddimTimesteps(T, S, spacing = "uniform") {
  if (S === 1) return [T];
  const steps = Array.from({ length: S }, (_, i) => i);
  if (spacing === "uniform") return steps.map((i) => 1 + i * Math.floor(T / S));
  if (spacing === "trailing") return steps.map((i) => round(((i + 1) * T) / S));
  const times = [];
  for (const i of steps) {
    const t = 1 + Math.floor((4 * T * i ** 2) / (5 * (S - 1) ** 2));
    times.push(i === 0 ? t : Math.max(t, times[i - 1] + 1));
  }
  return times;
}

/** ddim_sigma. */
export function ddimSigma(alphaT, alphaS, eta) {
  return eta * Math.sqrt(((1 - alphaS) / (1 - alphaT)) * (1 - alphaT / alphaS));
}

/** Equation 9: the image that goes with this noise. */
export const predictX0 = (xt, eps, alphaT) =>
  xt.map((x, i) => (x - Math.sqrt(1 - alphaT) * eps[i]) / Math.sqrt(alphaT));

/** clip_eps: the noise that goes with x̂0 clipped to [-1, 1]. */
export function clipEps(xt, eps, alphaT) {
  const [signal, noise] = [Math.sqrt(alphaT), Math.sqrt(1 - alphaT)];
  const x0 = predictX0(xt, eps, alphaT).map((x) => Math.min(Math.max(x, -1), 1));
  return xt.map((x, i) => (x - signal * x0[i]) / noise);
}

/** ddim_step, where z is the new noise. scale: what z is multiplied by, σ unless given. */
export function ddimStep(xt, eps, alphaT, alphaS, sigma = 0, z = null, scale = sigma) {
  const x0 = predictX0(xt, eps, alphaT);
  const epsCoef = Math.sqrt(Math.max(1 - alphaS - sigma ** 2, 0));
  const mean = x0.map((x, i) => Math.sqrt(alphaS) * x + epsCoef * eps[i]);
  return { x0, xs: z === null ? mean : mean.map((x, i) => x + scale * z[i]), epsCoef };
}

/** q_sample: the noisy image. */
export const qSample = (x0, eps, alphaT) =>
  x0.map((x, i) => Math.sqrt(alphaT) * x + Math.sqrt(1 - alphaT) * eps[i]);

/** From xt, at the last of the times, to the image. Yields everything that each step computed.
 *
 * broken: "silent" leaves out the noise of every step, "late" adds noise to the last image, too,
 * "number" tells the network the number of the step in place of its time. */
export function* ddimTrajectory(predict, alphaBar, xT, random, options) {
  const { times, eta = 0, clip = false, broken = "" } = options;
  let xt = xT;
  for (let k = times.length - 1; k >= 0; k--) {
    const [t, s] = [times[k], k > 0 ? times[k - 1] : 0];
    const [alphaT, alphaS] = [alphaBar[t], alphaBar[s]];
    const estimate = predict(xt, broken === "number" ? k + 1 : t);
    const raw = predictX0(xt, estimate.eps, alphaT);
    const eps = clip ? clipEps(xt, estimate.eps, alphaT) : estimate.eps;
    const sigma = ddimSigma(alphaT, alphaS, eta);
    const late = broken === "late" && s === 0;
    const noisy = late || (sigma > 0 && broken !== "silent");
    const z = noisy ? random.normal(xt.length) : null;
    const scale = late ? lastDeviation(alphaBar) : sigma;
    const { x0, xs, epsCoef } = ddimStep(xt, eps, alphaT, alphaS, sigma, z, scale);
    yield { t, s, xt, estimate, raw, eps, x0, xs, z, alphaT, alphaS, sigma, epsCoef };
    xt = xs;
  }
}

/** √β̃_2, DDPM's deviation at t = 1, where β̃_1 is 0 and has no logarithm (lesson_05/ddpm.py). */
export function lastDeviation(alphaBar) {
  const beta2 = 1 - alphaBar[2] / alphaBar[1];
  return Math.sqrt(((1 - alphaBar[1]) / (1 - alphaBar[2])) * beta2);
}

/** ddim_encode_trajectory: from the image to noise. */
export function* ddimEncodeTrajectory(predict, alphaBar, x0, times) {
  let xs = x0;
  for (let k = 0; k < times.length; k++) {
    const [s, t] = [k > 0 ? times[k - 1] : 0, times[k]];
    const { eps } = predict(xs, Math.max(s, 1));
    xs = ddimStep(xs, eps, alphaBar[s], alphaBar[t]).xs;
    yield { s, t, xs };
  }
}

/** slerp: the angle between two noises and what each contributes at a fraction of the arc. */
export function slerp(x, y, fraction) {
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const cosine = dot(x, y) / Math.sqrt(dot(x, x) * dot(y, y));
  const theta = Math.acos(Math.min(Math.max(cosine, -1), 1));
  const sine = Math.sin(theta);
  const straight = sine < 1e-3;
  const a = straight ? 1 - fraction : Math.sin((1 - fraction) * theta) / sine;
  const b = straight ? fraction : Math.sin(fraction * theta) / sine;
  return { theta, a, b, value: x.map((value, i) => a * value + b * y[i]) };
}

/** The length of a noise over √784: near 1 for noise as the network knows it. */
export const relativeLength = (x) => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length);

export const meanSquare = (x, y) => x.reduce((sum, v, i) => sum + (v - y[i]) ** 2, 0) / x.length;

/** mean_squared_error of lesson_06/laboratory.py: of clipped images, on the scale [0, 1]. */
export function imageError(x, y) {
  const scaled = (image) => image.map((v) => Math.min(Math.max(v, -1), 1) / 2);
  return meanSquare(scaled(x), scaled(y));
}
