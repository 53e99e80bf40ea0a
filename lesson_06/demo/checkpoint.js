// A shipped checkpoint: a safetensors file with weights in half precision.

/** 16 bits to a number: sign, 5 bits of exponent, 10 bits of fraction. */
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** The file's bytes -> its config and its averaged weights by name, as float32. */
export function readCheckpoint(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const start = 8 + Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const { config } = JSON.parse(header.__metadata__["diffusion-lessons"]);
  const weights = new Map();
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (dtype !== "F16") throw new Error(`${name} is ${dtype}, not F16`);
    const [from, to] = data_offsets;
    const values = Float32Array.from({ length: (to - from) / 2 }, (_, i) =>
      half(view.getUint16(start + from + 2 * i, true)),
    );
    weights.set(name.replace("ema.", ""), { shape, values });
  }
  return { config, weights };
}

export function fromBase64(text) {
  return Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
}
