"""Denoising Diffusion Probabilistic Models, Ho, Jain & Abbeel 2020 (arXiv 2006.11239), "Ho20".

Times t are counted as in the paper: x0 is the image, and xT is noise. Tables have shape
(T+1, 1, 1, 1), so that table[t] with t (B,) multiplies images (B, C, H, W); slot 0 is for the clean
image.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from common.errors import UserError

import torch
from torch import Tensor, nn

Network = Callable[[Tensor, Tensor], Tensor]
Variance = Literal["beta", "beta_tilde"]
Prediction = Literal["eps", "x0", "mean"]
Objective = Literal["simple", "vlb"]


class Gaussian(NamedTuple):
    """Independent normals, one per pixel: mean (B, C, H, W) and the natural log of the variance."""

    mean: Tensor
    log_var: Tensor


class BitsPerDim(NamedTuple):
    """An upper bound on the bits per dimension of each image: Eq. 5 / (C H W ln 2).

    total, prior: (B,). terms, t: (B, K), the terms L_{t-1} that were computed and their t. The
    total is the prior plus the sum of all T terms, estimated from K of them if K < T.
    """

    total: Tensor
    prior: Tensor
    terms: Tensor
    t: Tensor


def linear_beta(T: int, beta_1: float = 1e-4, beta_T: float = 0.02) -> Tensor:
    """Variances of the T forward steps, from beta_1 to beta_T in equal steps [Ho20 Section 4].

    float64 (T,). The paper has T = 1000; for another T the betas are multiplied by 1000/T, as in
    lesson 9's paper, so that x_T is still noise.
    """
    if not (T >= 1 and 0 < beta_1 <= beta_T and 1000 / T * beta_T < 1):
        raise UserError(
            f"num_timesteps T = {T}, beta_1 = {beta_1}, beta_T = {beta_T} is no linear schedule: "
            "T >= 1, 0 < beta_1 <= beta_T and 1000/T beta_T < 1 must hold"
        )
    return torch.linspace(beta_1, beta_T, T, dtype=torch.float64) * (1000 / T)


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


class DDPM(nn.Module):
    """The forward process q [Ho20 Eq. 2], its posterior, the reverse process p [Ho20 Eq. 1], their
    loss and their bound.

    Args:
        beta: float64 (T,), the variances of the forward steps.
        variance: of the reverse steps, "beta" or "beta_tilde", the two extremes [Ho20 Section 3.2].
        prediction: what the network's output is, the noise, the image x0 or the mean μ̃
            [Ho20 Section 3.2, Table 2].
        objective: the loss, the squared error of the prediction or the bound [Ho20 Table 2].
    """

    signal_rate: Tensor  # √ᾱ_t
    noise_rate: Tensor  # √(1-ᾱ_t)
    posterior_x0_coef: Tensor  # coefficients of x0 and xt in the posterior mean
    posterior_xt_coef: Tensor
    posterior_log_var: Tensor  # log β̃_t
    log_var: Tensor  # log σ_t² of the reverse steps

    def __init__(
        self,
        beta: Tensor,
        variance: Variance = "beta",
        prediction: Prediction = "eps",
        objective: Objective = "simple",
    ) -> None:
        super().__init__()
        kinds = {Variance: variance, Prediction: prediction, Objective: objective}
        for kind, value in kinds.items():
            if value not in get_args(kind):
                raise UserError(f"{value!r} is not known: choose {' or '.join(get_args(kind))}")
        self.prediction, self.objective = prediction, objective
        self.num_timesteps = T = len(beta)
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        beta = torch.cat([zero, beta.double()])
        self.alpha_bar = alpha_bar = (1 - beta).cumprod(0)
        alpha_bar_prev = torch.cat([one, alpha_bar[:-1]])
        noise_var = torch.cat([one, 1 - alpha_bar[1:]])  # 1 - ᾱ_t; 1 in slot 0 avoids 0/0

        beta_tilde = (1 - alpha_bar_prev) / noise_var * beta  # Eq. 7
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
        self.table("log_var", variances.log())

    def table(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values.float().view(-1, 1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.signal_rate.device

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The noisy image: xt = √ᾱ_t x0 + √(1-ᾱ_t) ε [Ho20 Eq. 4]."""
        return self.signal_rate[t] * x0 + self.noise_rate[t] * eps

    def q_posterior(self, x0: Tensor, xt: Tensor, t: Tensor) -> Gaussian:
        """q(x_{t-1} | xt, x0): the reverse step if x0 were known [Ho20 Eq. 6, 7].

        μ̃_t = √ᾱ_{t-1} β_t/(1-ᾱ_t) x0 + √α_t (1-ᾱ_{t-1})/(1-ᾱ_t) xt,  β̃_t = (1-ᾱ_{t-1})/(1-ᾱ_t) β_t
        """
        mean = self.posterior_x0_coef[t] * x0 + self.posterior_xt_coef[t] * xt
        return Gaussian(mean, self.posterior_log_var[t].expand_as(mean))

    def predict_x0(self, xt: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """The clean image if out is the noise in xt: Eq. 4 solved for x0 [Ho20 Eq. 15].

        For other predictions out is the image itself, or the mean μ̃, and Eq. 7 is solved for x0.
        """
        if self.prediction == "x0":
            return out
        if self.prediction == "mean":
            return (out - self.posterior_xt_coef[t] * xt) / self.posterior_x0_coef[t]
        return (xt - self.noise_rate[t] * out) / self.signal_rate[t]

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor, clip_x0: bool = True) -> Gaussian:
        """p(x_{t-1} | xt) from out = model(xt, t): the posterior, given x̂0 [Ho20 Eq. 11].

        Without clipping the mean equals Eq. 11's 1/√α_t (xt - β_t/√(1-ᾱ_t) ε̂).
        Differs: clipping x̂0 to [-1, 1] is in the authors' code, not in the paper.
        """
        x0_hat = self.predict_x0(xt, t, out)
        if clip_x0:
            x0_hat = x0_hat.clamp(-1, 1)
        mean = self.q_posterior(x0_hat, xt, t).mean
        return Gaussian(mean, self.log_var[t].expand_as(mean))

    def loss(self, model: Network, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """L_simple: the mean squared error of the predicted noise [Ho20 Eq. 14].

        (B,), the mean over each image's values: about 1 for a network that predicts 0.
        """
        if (self.prediction, self.objective) != ("eps", "simple"):
            return self.other_loss(model, x0, t, eps)
        eps_hat = model(self.q_sample(x0, t, eps), t)
        return ((eps - eps_hat) ** 2).flatten(1).mean(1)

    def other_loss(self, model: Network, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The mean squared error of another prediction, or T times the term of the bound at t,
        which estimates the sum over t, (B,) [Ho20 Table 2]."""
        if self.objective == "vlb":
            return self.num_timesteps * self.vlb_term(model, x0, t, eps)
        xt = self.q_sample(x0, t, eps)
        target = x0 if self.prediction == "x0" else self.q_posterior(x0, xt, t).mean
        return ((target - model(xt, t)) ** 2).flatten(1).mean(1)

    @torch.no_grad()
    def p_sample(self, model: Network, xt: Tensor, t: int, clip_x0: bool = True) -> Tensor:
        """One reverse step: x_{t-1} from xt, without noise at t = 1 [Ho20 Algorithm 2]."""
        t_batch = torch.full((len(xt),), t, device=xt.device)
        p = self.p_mean_variance(model(xt, t_batch), xt, t_batch, clip_x0)
        return p.mean if t == 1 else p.mean + torch.exp(0.5 * p.log_var) * torch.randn_like(xt)

    def trajectory(
        self, model: Network, x_T: Tensor, clip_x0: bool = True
    ) -> Iterator[tuple[int, Tensor]]:
        """From noise x_T (B, C, H, W) to x0: yields (t, xt), t = T-1 ... 0 [Ho20 Algorithm 2]."""
        xt = x_T
        for t in range(self.num_timesteps, 0, -1):
            xt = self.p_sample(model, xt, t, clip_x0)
            yield t - 1, xt

    def sample(self, model: Network, x_T: Tensor, clip_x0: bool = True) -> Tensor:
        """The images at the end of the trajectory from x_T (B, C, H, W)."""
        for _, xt in self.trajectory(model, x_T, clip_x0):
            x0 = xt
        return x0

    def vlb_term(
        self, model: Network, x0: Tensor, t: Tensor, eps: Tensor, clip_x0: bool = False
    ) -> Tensor:
        """The term of the bound at t, in bits per dimension, (B,) [Ho20 Eq. 5].

        t > 1: L_{t-1} = KL(q(x_{t-1} | xt, x0) || p(x_{t-1} | xt));  t = 1: L_0 = -log p(x0 | x1)
        """
        xt = self.q_sample(x0, t, eps)
        p = self.p_mean_variance(model(xt, t), xt, t, clip_x0)
        nats = torch.where(
            (t == 1).view(-1, 1, 1, 1),
            -discretized_log_likelihood(x0, p),
            kl(self.q_posterior(x0, xt, t), p),
        )
        return nats.flatten(1).mean(1) / math.log(2)

    def prior_bits(self, x0: Tensor) -> Tensor:
        """L_T = KL(q(xT | x0) || N(0, 1)), in bits per dimension, (B,) [Ho20 Eq. 5]."""
        T = self.num_timesteps
        mean = self.signal_rate[T] * x0
        q = Gaussian(mean, 2 * self.noise_rate[T].log().expand_as(mean))
        standard = Gaussian(torch.zeros_like(mean), torch.zeros_like(mean))
        return kl(q, standard).flatten(1).mean(1) / math.log(2)

    @torch.no_grad()
    def bits_per_dim(
        self, model: Network, x0: Tensor, num_terms: int | None = None, clip_x0: bool = False
    ) -> BitsPerDim:
        """The bound of Eq. 5 on x0 (B, C, H, W), each image with its own noise [Ho20 Eq. 5].

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


@torch.no_grad()
def preview(process: DDPM, model: Network, x_T: Tensor, num_steps: int = 50) -> Tensor:
    """Quick samples while training: Algorithm 2 on num_steps of the T steps, evenly spaced.

    For a step from t to s < t, Eq. 6 and 7 hold with ᾱ_s for ᾱ_{t-1} and 1 - ᾱ_t/ᾱ_s for β_t.
    Differs: the paper takes every step. Lessons 6 and 9 explain why fewer can be enough.
    """
    T = process.num_timesteps
    times = torch.linspace(T, 0, min(num_steps, T) + 1).round().long().tolist()
    xt = x_T
    for t, s in pairwise(times):
        t_batch = torch.full((len(xt),), t, device=xt.device)
        x0_hat = process.predict_x0(xt, t_batch, model(xt, t_batch)).clamp(-1, 1)
        bar_t, bar_s = process.alpha_bar[t].item(), process.alpha_bar[s].item()
        beta = 1 - bar_t / bar_s
        mean = math.sqrt(bar_s) * beta * x0_hat + math.sqrt(bar_t / bar_s) * (1 - bar_s) * xt
        variance = (1 - bar_s) / (1 - bar_t) * beta  # 0 at the last step, s = 0
        xt = mean / (1 - bar_t) + math.sqrt(variance) * torch.randn_like(xt)
    return xt
