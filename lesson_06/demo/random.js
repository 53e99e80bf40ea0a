// PyTorch's random numbers on a CPU: the same seed gives the same noise as torch.manual_seed.
//
// The generator is the Mersenne Twister MT19937 [Matsumoto and Nishimura 1998]. Normal numbers come
// sixteen at a time from pairs of uniform ones: Box and Muller's cosines, then their sines.

const SIZE = 624;
const SHIFT = 397;

export class TorchRandom {
  constructor(seed) {
    this.state = new Uint32Array(SIZE);
    this.state[0] = seed;
    for (let i = 1; i < SIZE; i++) {
      const last = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, last) + i;
    }
    this.next = SIZE;
  }

  /** 32 random bits. */
  bits() {
    if (this.next === SIZE) this.twist();
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  twist() {
    const { state } = this;
    for (let i = 0; i < SIZE; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % SIZE] & 0x7fffffff);
      state[i] = state[(i + SHIFT) % SIZE] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }

  /** torch.randn(count), for a multiple of 16. */
  normal(count) {
    const values = Float32Array.from({ length: count }, () => (this.bits() & 0xffffff) * 2 ** -24);
    for (let first = 0; first < count; first += 16) {
      for (let i = first; i < first + 8; i++) {
        const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
        const angle = 2 * Math.PI * values[i + 8];
        values[i] = radius * Math.cos(angle);
        values[i + 8] = radius * Math.sin(angle);
      }
    }
    return values;
  }
}
