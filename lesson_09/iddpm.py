"""Improved Denoising Diffusion Probabilistic Models, Nichol & Dhariwal 2021 (arXiv 2102.09672),
"Nichol21".

It adds to lesson 5 a cosine schedule, a learned variance, the loss that trains it, and sampling in
fewer steps. `diff -u lesson_05/ddpm.py lesson_09/iddpm.py` shows what is new.

Times t count as in the paper: x0 is the image, xT is noise, and slot 0 of every table is the clean
image's. Tables have shape (T+1, 1, 1, 1), so that table[t] with t (B,) multiplies images
(B, C, H, W).
"""

import math
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from common.errors import UserError

import torch
from torch import Tensor, nn

Network = Callable[[Tensor, Tensor], Tensor]
Variance = Literal["learned", "beta", "beta_tilde"]
Schedule = Literal["linear", "cosine"]


class Gaussian(NamedTuple):
    """Independent normals, one per pixel: mean (B, C, H, W) and the natural log of the variance."""

    mean: Tensor
    log_var: Tensor


class BitsPerDim(NamedTuple):
    """An upper bound on the bits per dimension of each image: Eq. 4 / (C H W ln 2).

    total, prior: (B,). terms, t: (B, K), the terms L_{t-1} that were computed and their t. The
    total is the prior plus the sum of all T terms, estimated from K of them if K < T.
    """

    total: Tensor
    prior: Tensor
    terms: Tensor
    t: Tensor


def linear_beta(T: int, beta_1: float = 1e-4, beta_T: float = 0.02) -> Tensor:
    """Variances of the T forward steps, from beta_1 to beta_T in equal steps [Ho20 Section 4].

    float64 (T,). The paper has T = 1000. For another T the betas are multiplied by 1000/T, as in
    the code of Nichol21, so that x_T is still noise.
    """
    if not (T >= 1 and 0 < beta_1 <= beta_T and 1000 / T * beta_T < 1):
        raise UserError(
            f"num_timesteps T = {T}, beta_1 = {beta_1}, beta_T = {beta_T} is no linear schedule: "
            "T >= 1, 0 < beta_1 <= beta_T and 1000/T beta_T < 1 must hold"
        )
    return torch.linspace(beta_1, beta_T, T, dtype=torch.float64) * (1000 / T)


def cosine_beta(T: int, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Variances of the T forward steps for which ᾱ falls like a squared cosine [Nichol21 Eq. 17].

    ᾱ_t = f(t)/f(0),  f(t) = cos²((t/T + s)/(1 + s) · π/2),  β_t = min(1 - ᾱ_t/ᾱ_{t-1}, max_beta)

    float64 (T,). s keeps the first steps from being too small to matter. max_beta limits the last
    step, whose variance would be 1, since f(T) = 0.
    """
    if not (T >= 1 and s >= 0 and 0 < max_beta < 1):
        raise UserError(
            f"no cosine schedule has T = {T}, s = {s}, max_beta = {max_beta}: "
            "T >= 1, s >= 0 and 0 < max_beta < 1 must hold"
        )
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + s) / (1 + s) * (math.pi / 2)) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


def named_beta(schedule: Schedule, T: int) -> Tensor:
    """The schedule of that name, with the paper's constants. float64 (T,)."""
    schedules = {"linear": linear_beta, "cosine": cosine_beta}
    if schedule not in schedules:
        raise UserError(f"schedule {schedule!r} is not known: it must be {' or '.join(schedules)}")
    return schedules[schedule](T)


def kl(p: Gaussian, q: Gaussian) -> Tensor:
    """The KL divergence KL(p || q), in nats per element.

    KL(p || q) = ½ [log(σq²/σp²) + (σp² + (μp - μq)²) / σq² - 1]
    """
    log_ratio = p.log_var - q.log_var
    return 0.5 * (log_ratio.exp() - log_ratio - 1 + (p.mean - q.mean) ** 2 / q.log_var.exp())


def log_ndtr(x: Tensor) -> Tensor:
    """log Φ(x), with Φ the distribution function of N(0, 1).

    x < 0: log(½ erfcx(-x/√2)) - x²/2,  x >= 0: log(1 - ½ erfc(x/√2));  erfcx(z) = exp(z²) erfc(z)

    In place of torch.special.log_ndtr, whose float32 gradient is wrong for x far below 0, and which
    Apple's GPUs do not have.
    """
    below, above = torch.where(x < 0, x, 0.0), torch.where(x < 0, 0.0, x)  # no branch overflows
    left = torch.log(torch.special.erfcx(-math.sqrt(0.5) * below) / 2) - below**2 / 2
    return torch.where(x < 0, left, torch.log1p(-torch.erfc(math.sqrt(0.5) * above) / 2))


def discretized_log_likelihood(x: Tensor, p: Gaussian) -> Tensor:
    """Log of the probability of each pixel's 8-bit level under p, in nats per pixel [Ho20 Eq. 13].

    log ∫ N(x; μ, σ²) dx from x - 1/255 to x + 1/255; the outermost levels extend to -∞ and ∞.

    x (B, C, H, W) on the grid -1, -1 + 2/255, ..., 1.
    Where the interval is narrow beside σ, the probability is its width times the density.
    Differs: computed from log Φ, so that far tails need no floor (the authors' is 1e-12).
    """
    precision = torch.exp(-0.5 * p.log_var)
    above = precision * (x + 1 / 255 - p.mean)
    below = precision * (x - 1 / 255 - p.mean)
    # Φ(b) - Φ(a) = Φ(-a) - Φ(-b): use the one in the left tail, where log Φ is exact.
    right_tail = above + below > 0
    high = log_ndtr(torch.where(right_tail, -below, above))
    low = log_ndtr(torch.where(right_tail, -above, below))
    centre, width = (above + below) / 2, precision * (2 / 255)
    narrow = width * (1 + centre.abs()) < 1e-2  # there the difference of two Φ loses digits
    density = -0.5 * (centre**2 + math.log(2 * math.pi)) + torch.log(width)
    exact = high + torch.log(-torch.expm1(torch.where(narrow, -1.0, low - high)))
    inside = torch.where(narrow, density, exact)
    lowest, highest = x < -1 + 1 / 255, x > 1 - 1 / 255
    outer = torch.where(lowest, log_ndtr(above), log_ndtr(-below))
    return torch.where(lowest | highest, outer, inside)


class ImprovedDDPM(nn.Module):
    """The forward process q [Nichol21 Eq. 2], its posterior, the reverse process p
    [Nichol21 Eq. 3], their loss and their bound.

    Args:
        beta: float64 (T,), the variances of the forward steps.
        variance: of the reverse steps: "beta", "beta_tilde", or "learned", which interpolates
            between the two.
        simple_weight: weight of L_simple in the loss.
        vlb_weight: λ, the weight of L_vlb. The two weights are (1, 0) for L_simple, (1, 1e-3) for
            L_hybrid and (0, 1) for L_vlb.
        timesteps: the T times t that the network gets, ascending; 1..T unless given.
    """

    signal_rate: Tensor  # √ᾱ_t
    noise_rate: Tensor  # √(1-ᾱ_t)
    posterior_x0_coef: Tensor  # coefficients of x0 and xt in the posterior mean
    posterior_xt_coef: Tensor
    posterior_log_var: Tensor  # log β̃_t
    log_beta: Tensor  # log β_t
    log_var: Tensor  # log σ_t² of the reverse steps, unless it is learned
    timesteps: Tensor  # int64 (T+1,): the times that the network gets

    def __init__(
        self,
        beta: Tensor,
        variance: Variance = "learned",
        simple_weight: float = 1.0,
        vlb_weight: float = 1e-3,
        timesteps: Tensor | None = None,
    ) -> None:
        super().__init__()
        if variance not in ("learned", "beta", "beta_tilde"):
            raise UserError(
                f"variance {variance!r} is not known: it must be learned, beta or beta_tilde"
            )
        if min(simple_weight, vlb_weight) < 0 or simple_weight + vlb_weight == 0:
            raise UserError(
                f"simple_weight is {simple_weight} and vlb_weight {vlb_weight}: "
                "neither may be negative, and one must be positive"
            )
        self.variance, self.simple_weight, self.vlb_weight = variance, simple_weight, vlb_weight
        self.num_timesteps = T = len(beta)
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        beta = torch.cat([zero, beta.double()])
        self.alpha_bar = alpha_bar = (1 - beta).cumprod(0)
        alpha_bar_prev = torch.cat([one, alpha_bar[:-1]])
        noise_var = torch.cat([one, 1 - alpha_bar[1:]])  # 1 - ᾱ_t; 1 in slot 0 avoids 0/0

        beta_tilde = (1 - alpha_bar_prev) / noise_var * beta  # Eq. 10
        # β̃_1 = 0 has no logarithm; as in the authors' code, β̃_2 replaces it for both variances.
        beta_tilde[:2] = beta_tilde[min(2, T)] if T > 1 else beta[1]
        variances = (
            beta_tilde if variance == "beta_tilde" else torch.cat([beta_tilde[:2], beta[2:]])
        )

        self.table("signal_rate", alpha_bar.sqrt())
        self.table("noise_rate", (1 - alpha_bar).sqrt())
        self.table("posterior_x0_coef", alpha_bar_prev.sqrt() * beta / noise_var)
        self.table("posterior_xt_coef", (1 - beta).sqrt() * (1 - alpha_bar_prev) / noise_var)
        self.table("posterior_log_var", beta_tilde.log())
        self.table("log_beta", torch.cat([beta[1:2], beta[1:]]).log())  # β_1 itself at t = 1
        self.table("log_var", variances.log())
        times = torch.arange(1, T + 1) if timesteps is None else timesteps
        self.register_buffer("timesteps", torch.cat([zero.long(), times]), persistent=False)

    def table(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values.float().view(-1, 1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.signal_rate.device

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The noisy image: xt = √ᾱ_t x0 + √(1-ᾱ_t) ε [Nichol21 Eq. 9]."""
        return self.signal_rate[t] * x0 + self.noise_rate[t] * eps

    def q_posterior(self, x0: Tensor, xt: Tensor, t: Tensor) -> Gaussian:
        """q(x_{t-1} | xt, x0): the reverse step if x0 were known [Nichol21 Eq. 10-12].

        μ̃_t = √ᾱ_{t-1} β_t/(1-ᾱ_t) x0 + √α_t (1-ᾱ_{t-1})/(1-ᾱ_t) xt,  β̃_t = (1-ᾱ_{t-1})/(1-ᾱ_t) β_t
        """
        mean = self.posterior_x0_coef[t] * x0 + self.posterior_xt_coef[t] * xt
        return Gaussian(mean, self.posterior_log_var[t].expand_as(mean))

    def predict_x0(self, xt: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The clean image in xt if eps is the noise in it: Eq. 9 solved for x0."""
        return (xt - self.noise_rate[t] * eps) / self.signal_rate[t]

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor, clip_x0: bool = True) -> Gaussian:
        """p(x_{t-1} | xt) from out = model(xt, t): the posterior mean of the estimated x0.

        out is (B, 2C, H, W), ε̂ and then v; for a fixed variance ε̂ (B, C, H, W) is enough.
        Without clipping the mean equals 1/√α_t (xt - β_t/√(1-ᾱ_t) ε̂) [Nichol21 Eq. 13].
        σ_t² = exp(f log β_t + (1-f) log β̃_t), f = (v + 1)/2 [Nichol21 Eq. 15]
        Differs: the paper's v is f. Here, as in the authors' code, a network whose output is 0
        gives the variance halfway between β̃_t and β_t.
        Differs: clipping x̂0 to [-1, 1] is in the authors' code, not in the paper. v is clipped to
        [-100, 100], so that the loss and its gradient are finite for any v.
        """
        channels = xt.shape[1]
        x0_hat = self.predict_x0(xt, t, out[:, :channels])
        if clip_x0:
            x0_hat = x0_hat.clamp(-1, 1)
        mean = self.q_posterior(x0_hat, xt, t).mean
        if self.variance != "learned":
            return Gaussian(mean, self.log_var[t].expand_as(mean))
        _, v = out.split(channels, dim=1)
        frac = (v.clamp(-100, 100) + 1) / 2
        return Gaussian(mean, frac * self.log_beta[t] + (1 - frac) * self.posterior_log_var[t])

    def loss(self, model: Network, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """L_simple + λ L_vlb, estimated from one t for each image, (B,) [Nichol21 Eq. 16]."""
        return self.weighted(*self.loss_terms(model, x0, t, eps))

    def loss_terms(
        self, model: Network, x0: Tensor, t: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The two terms of the loss, (B,) each [Nichol21 Eq. 14, 5, 6].

        simple: the mean squared error of the predicted noise, averaged over each image's values;
        about 1 for a network that predicts 0.
        vlb: the term of the bound at t, in bits per dimension. If L_simple trains the mean, L_vlb
        trains only the variance: no gradient flows through the mean [Nichol21 Section 3.1].
        """
        xt = self.q_sample(x0, t, eps)
        out = model(xt, self.timesteps[t])
        eps_hat, v = out[:, : x0.shape[1]], out[:, x0.shape[1] :]
        simple = ((eps - eps_hat) ** 2).flatten(1).mean(1)
        if self.simple_weight > 0:
            out = torch.cat([eps_hat.detach(), v], dim=1)
        p = self.p_mean_variance(out, xt, t, clip_x0=False)
        return simple, self.term_bits(p, x0, xt, t)

    def weighted(self, simple: Tensor, vlb: Tensor) -> Tensor:
        """The loss from its two terms [Nichol21 Eq. 16].

        L_vlb is a sum over all T times [Eq. 4]. T times the term at one random t estimates this
        sum. λ multiplies the estimate, not the single term.
        """
        return self.simple_weight * simple + self.vlb_weight * self.num_timesteps * vlb

    @torch.no_grad()
    def p_sample(self, model: Network, xt: Tensor, t: int, clip_x0: bool = True) -> Tensor:
        """One reverse step: x_{t-1} from xt, without noise at t = 1."""
        t_batch = torch.full((len(xt),), t, device=xt.device)
        p = self.p_mean_variance(model(xt, self.timesteps[t_batch]), xt, t_batch, clip_x0)
        return p.mean if t == 1 else p.mean + torch.exp(0.5 * p.log_var) * torch.randn_like(xt)

    def trajectory(
        self, model: Network, x_T: Tensor, clip_x0: bool = True
    ) -> Iterator[tuple[int, Tensor]]:
        """From noise x_T (B, C, H, W) to images: yields (t, xt), t = T-1 ... 0."""
        xt = x_T
        for t in range(self.num_timesteps, 0, -1):
            xt = self.p_sample(model, xt, t, clip_x0)
            yield t - 1, xt

    def sample(self, model: Network, x_T: Tensor, clip_x0: bool = True) -> Tensor:
        """The images at the end of the trajectory from x_T (B, C, H, W)."""
        for _, xt in self.trajectory(model, x_T, clip_x0):
            x0 = xt
        return x0

    def strided(self, num_steps: int) -> "ImprovedDDPM":
        """A process of S = num_steps steps, with the ᾱ of S of the T times, τ_1 < ... < τ_S
        [Nichol21 Eq. 19].

        β_i = 1 - ᾱ_{τ_i}/ᾱ_{τ_{i-1}}. β̃_i, and with it the learned variance, follows from these.
        At step i the network gets τ_i, the time at which it saw this much noise in training.
        """
        times = strided_timesteps(self.num_timesteps, num_steps)
        alpha_bar = self.alpha_bar[times]
        beta = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        weights = self.simple_weight, self.vlb_weight
        strided = ImprovedDDPM(beta, self.variance, *weights, self.timesteps.cpu()[times])
        return strided.to(self.device)

    def vlb_term(
        self, model: Network, x0: Tensor, t: Tensor, eps: Tensor, clip_x0: bool = False
    ) -> Tensor:
        """The term of the bound at t, in bits per dimension, (B,) [Nichol21 Eq. 4]."""
        xt = self.q_sample(x0, t, eps)
        p = self.p_mean_variance(model(xt, self.timesteps[t]), xt, t, clip_x0)
        return self.term_bits(p, x0, xt, t)

    def term_bits(self, p: Gaussian, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The term of the bound at t, given p = p(x_{t-1} | xt) [Nichol21 Eq. 5, 6].

        t > 1: L_{t-1} = KL(q(x_{t-1} | xt, x0) || p(x_{t-1} | xt));  t = 1: L_0 = -log p(x0 | x1)
        """
        nats = kl(self.q_posterior(x0, xt, t), p)
        last = t == 1
        decoder = Gaussian(p.mean[last], p.log_var[last])
        nats[last] = -discretized_log_likelihood(x0[last], decoder)
        return nats.flatten(1).mean(1) / math.log(2)

    def prior_bits(self, x0: Tensor) -> Tensor:
        """L_T = KL(q(xT | x0) || N(0, 1)), in bits per dimension, (B,) [Nichol21 Eq. 7]."""
        T = self.num_timesteps
        mean = self.signal_rate[T] * x0
        q = Gaussian(mean, 2 * self.noise_rate[T].log().expand_as(mean))
        standard = Gaussian(torch.zeros_like(mean), torch.zeros_like(mean))
        return kl(q, standard).flatten(1).mean(1) / math.log(2)

    @torch.no_grad()
    def bits_per_dim(
        self, model: Network, x0: Tensor, num_terms: int | None = None, clip_x0: bool = False
    ) -> BitsPerDim:
        """The bound of Eq. 4 on x0 (B, C, H, W), each image with its own noise [Nichol21 Eq. 4].

        All T terms, or an unbiased estimate from `num_terms` of them: t = 1, and one t from each of
        num_terms - 1 equal parts of 2..T, drawn for each image and weighted by the part's length.
        The standard error of the mean over images is total.std() / √B.
        """
        edges = strata(self.num_timesteps, num_terms)
        prior = self.prior_bits(x0)
        total, terms, times = prior.clone(), [], []
        for first, last in pairwise(edges):
            t = torch.randint(first, last, (len(x0),), device=x0.device)
            term = self.vlb_term(model, x0, t, torch.randn_like(x0), clip_x0)
            total += (last - first) * term
            terms.append(term)
            times.append(t)
        return BitsPerDim(total, prior, torch.stack(terms, 1), torch.stack(times, 1))


def strata(T: int, num_terms: int | None) -> list[int]:
    """Edges that cut 1..T into num_terms parts [edge, next edge): {1}, then 2..T evenly."""
    parts = T if num_terms is None else num_terms
    if not (parts == T or 2 <= parts < T):
        raise UserError(f"num_terms is {num_terms}: the bound has {T} terms, choose 2 to {T}")
    return [1] + [2 + (T - 1) * k // max(parts - 1, 1) for k in range(parts)]


def strided_timesteps(T: int, num_steps: int) -> Tensor:
    """S = num_steps times, evenly spaced from 1 to T: 1 + round(i (T-1)/(S-1)) for i = 0 ... S-1
    [Nichol21 Section 4].

    int64 (S,), ascending, for every S from 1 to T. As in the authors' code, i (T-1)/(S-1) is a
    running sum in floating point, and halves are rounded to even.
    Differs: S = 1 takes t = T. The authors' code takes t = 1.
    """
    if not 1 <= num_steps <= T:
        raise UserError(f"num_steps is {num_steps}: it must be from 1 to {T}")
    if num_steps == 1:
        return torch.tensor([T])
    strides = [(T - 1) / (num_steps - 1)] * (num_steps - 1)
    return torch.tensor([1 + round(total) for total in accumulate(strides, initial=0.0)])
