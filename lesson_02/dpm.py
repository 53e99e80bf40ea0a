"""Deep Unsupervised Learning using Nonequilibrium Thermodynamics, Sohl-Dickstein, Weiss,
Maheswaranathan & Ganguli 2015 (arXiv 1503.03585), "SD15": Gaussian diffusion.

The paper's x^(t) is xt here. Times t count as in the paper: x0 is the data, of variance 1, xT is
noise, and slot 0 of every table is the data's. Tables have shape (T+1, 1, 1, 1), so that table[t]
with t (B,) multiplies images (B, C, H, W). A point in the plane is (B, 2, 1, 1).
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, TypeVar

from common.errors import UserError, check_at_least
from common.sampling import last_images

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = Callable[[Tensor, Tensor], Tensor]
Number = TypeVar("Number", float, Tensor)
NUM_BUMPS = 10
LN2 = math.log(2)
# The mean log2 density under N(0, 1) of data with mean square 1.
L_NULL = -0.5 * math.log2(2 * math.pi * math.e)


class Gaussian(NamedTuple):
    """Independent normals, one per pixel: mean (B, C, H, W) and the natural log of the variance."""

    mean: Tensor
    log_var: Tensor


class BitsPerDim(NamedTuple):
    """An upper bound on the bits per dimension of each image: -K / C, with K of Eq. 14.

    total: (B,), for the standardised data x0. terms, t: (B, N), the terms of the bound that were
    computed, in bits per dimension, and their t. The total contains the sum of all T - 1 terms,
    estimated from N of them if N < T - 1.
    """

    total: Tensor
    terms: Tensor
    t: Tensor


class Rates(NamedTuple):
    """The tables of the process, functions of β: float32 (T+1, 1, 1, 1)."""

    log_odds: Tensor  # log β_t/(1-β_t)
    decay: Tensor  # √(1-β_t)
    spread: Tensor  # √β_t
    signal_rate: Tensor  # √ᾱ_t, with ᾱ_t the product of all 1-β up to t
    noise_rate: Tensor  # √(1-ᾱ_t)
    posterior_x0_coef: Tensor  # coefficients of x0 and xt in the posterior mean
    posterior_xt_coef: Tensor
    posterior_log_var: Tensor


def k_minus_null(bits_per_dim: Number, channels: int) -> Number:
    """The paper's measure, in bits per pixel over all channels; higher is better [SD15 Table 1].

    K - L_null = C (-bits_per_dim + ½ log2(2πe)): the bound on the log-likelihood, minus the
    log-likelihood under N(0, 1).
    """
    return channels * (-L_NULL - bits_per_dim)


def erasing_beta(T: int) -> Tensor:
    """Variances of the T forward steps, each of which erases about 1/T of the data's initial
    variance [SD15 Section 2.4.1, the code].

    β_t = m_t + (1 - m_t - 1e-5) / (T, ..., 2)_t,  m_1 = 0.001001,  m_t = 0.000001 for t > 1

    float64 (T,), from 1/T up to 1/2. The divisors fall evenly from T to 2.
    Differs: the paper has this schedule for binary data, and finds in its second footnote that it
    works as well for Gaussian diffusion.
    """
    if T < 2:
        raise UserError(f"num_timesteps is {T}: it must be at least 2")
    least = torch.full((T,), 1e-6, dtype=torch.float64)
    least[0] += 1e-3
    return least + (1 - least - 1e-5) / torch.linspace(T, 2, T, dtype=torch.float64)


def bumps(T: int, log_bumps: bool = False) -> Tensor:
    """Ten bumps over the times, which sum to one at every t [SD15 Appendix D.2].

    g_j(t) = exp(-(t - τ_j)²/(2w²)) / Σ_k exp(-(t - τ_k)²/(2w²)),  τ_j evenly from 1 to T

    float32 (T+1, 10); slot 0 is a copy of slot 1. With log_bumps they are even in
    log t / log T + t / T in place of t: half of them in log t, half in t.
    Differs: the width w is half the distance between neighbouring bumps, as in the authors' code;
    in the paper it is the whole distance. log_bumps are not in the paper.
    """
    check_at_least(2, num_timesteps=T)
    t = torch.arange(T + 1, dtype=torch.float64).clamp(min=1)
    t = t.log() / math.log(T) + t / T if log_bumps else t
    centre = torch.linspace(float(t[0]), float(t[-1]), NUM_BUMPS, dtype=torch.float64)
    width = (t[-1] - t[0]) / (NUM_BUMPS - 1) / 2
    return torch.softmax(-(((t[:, None] - centre) / width) ** 2) / 2, dim=1).float()


def rates(beta: Tensor) -> Rates:
    """All tables from beta, float64 (T,); they can be differentiated with respect to it."""
    one, zero = beta.new_ones(1), beta.new_zeros(1)
    alpha_bar = torch.cat([one, (1 - beta).cumprod(0)])
    noise_var, noise_var_prev = 1 - alpha_bar[1:], 1 - alpha_bar[:-1]
    x0_coef = alpha_bar[:-1].sqrt() * beta / noise_var
    xt_coef = (1 - beta).sqrt() * noise_var_prev / noise_var
    # At t = 1 the posterior is the point x0, and p has no such step: slots 0 and 1 copy slot 2.
    log_var = (noise_var_prev[1:] / noise_var[1:] * beta[1:]).log()
    tables = Rates(
        log_odds=torch.cat([zero, beta.logit()]),
        decay=torch.cat([one, (1 - beta).sqrt()]),
        spread=torch.cat([zero, beta.sqrt()]),
        signal_rate=alpha_bar.sqrt(),
        noise_rate=torch.cat([zero, noise_var.sqrt()]),
        posterior_x0_coef=torch.cat([one, x0_coef]),
        posterior_xt_coef=torch.cat([zero, xt_coef]),
        posterior_log_var=torch.cat([log_var[:1], log_var[:1], log_var]),
    )
    return Rates(*(table.float().view(-1, 1, 1, 1) for table in tables))


def kl(p: Gaussian, q: Gaussian) -> Tensor:
    """The KL divergence KL(p || q), in nats per element.

    KL(p || q) = ½ [log(σq²/σp²) + (σp² + (μp - μq)²) / σq² - 1]
    """
    log_ratio = p.log_var - q.log_var
    return 0.5 * (log_ratio.exp() - log_ratio - 1 + (p.mean - q.mean) ** 2 / q.log_var.exp())


def multiply(p: Gaussian, y: Tensor, noise_var: Tensor) -> Gaussian:
    """p(x) N(y; x, noise_var), normalised: prior p updated by evidence y [SD15 Section 2.5.3].

    w = var/(var + noise_var),  mean' = mean + w (y - mean),  var' = (1 - w) var

    noise_var (B, C, H, W): 0 where x is known, so that the mean is exactly y and the variance 0;
    infinite where x is unknown.
    """
    weight = p.log_var.exp() / (p.log_var.exp() + noise_var)
    return Gaussian(torch.lerp(p.mean, y, weight), p.log_var + torch.log1p(-weight))


class DPM(nn.Module):
    """The forward process q, its posterior, the reverse process p, their bound, and sampling.

    Args:
        beta: float64 (T,), the variances of the forward steps.
        learned: whether β_2..β_T are parameters, trained with the network by the same bound; they
            start at beta [SD15 Section 2.4.1].
    """

    def __init__(self, beta: Tensor, learned: bool = False) -> None:
        super().__init__()
        self.num_timesteps = T = len(beta)
        self.log_odds = beta.double().logit()
        self.bumps = bumps(T)[1:].double()
        self.bumps[0] = 0  # β_1 stays fixed: it keeps the bound finite
        self.shift = nn.Parameter(torch.zeros(NUM_BUMPS)) if learned else None
        for name, table in rates(beta.double())._asdict().items():
            self.register_buffer(f"fixed_{name}", table, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.get_buffer("fixed_decay").device

    def beta(self) -> Tensor:
        """β_1..β_T, float64 (T,). Learned rates are σ(logit β_t + Σ_j g_j(t) shift_j) for t > 1."""
        if self.shift is None:
            return self.log_odds.sigmoid()
        return torch.sigmoid(self.log_odds + self.bumps @ self.shift.cpu().double())

    def rates(self) -> Rates:
        if self.shift is None:
            return Rates(*(self.get_buffer(f"fixed_{name}") for name in Rates._fields))
        return Rates(*(table.to(self.device) for table in rates(self.beta())))

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The noisy image, after t steps at once: xt = √ᾱ_t x0 + √(1-ᾱ_t) ε [SD15 Section 2.1]."""
        r = self.rates()
        return r.signal_rate[t] * x0 + r.noise_rate[t] * eps

    def q_posterior(self, x0: Tensor, xt: Tensor, t: Tensor) -> Gaussian:
        """q(x_{t-1} | xt, x0), t > 1: the reverse step if x0 were known [SD15 Eq. 14].

        mean √ᾱ_{t-1} β_t/(1-ᾱ_t) x0 + √(1-β_t) (1-ᾱ_{t-1})/(1-ᾱ_t) xt,
        variance (1-ᾱ_{t-1})/(1-ᾱ_t) β_t
        """
        r = self.rates()
        mean = r.posterior_x0_coef[t] * x0 + r.posterior_xt_coef[t] * xt
        return Gaussian(mean, r.posterior_log_var[t].expand_as(mean))

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor) -> Gaussian:
        """p(x_{t-1} | xt), t > 1, from out = model(xt, t) = (μ, b) [SD15 Eq. 64, 65, the code].

        mean xt √(1-β_t) + μ √β_t,  variance σ(b/√T + logit β_t)

        out (B, 2C, H, W). With out = 0 it is the forward step.
        Differs: the paper has the mean (xt - μ)(1 - variance) + μ, and b instead of b/√T. The
        latter is clipped to [-50, 50], so that the bound and its gradient are finite for any b.
        """
        r = self.rates()
        mu, b = out.chunk(2, dim=1)
        mean = r.decay[t] * xt + r.spread[t] * mu
        b = (b / math.sqrt(self.num_timesteps)).clamp(-50, 50)
        return Gaussian(mean, F.logsigmoid(b + r.log_odds[t]))

    def vlb_term(self, model: Network, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The term of the bound at t > 1, in bits per dimension, (B,) [SD15 Eq. 14].

        KL(q(x_{t-1} | xt, x0) || p(x_{t-1} | xt))

        It can also be differentiated with respect to learned rates: xt is a function of them and of
        eps, the paper's "frozen noise" [SD15 Section 2.4.1].
        """
        xt = self.q_sample(x0, t, eps)
        p = self.p_mean_variance(model(xt, t), xt, t)
        return kl(self.q_posterior(x0, xt, t), p).flatten(1).mean(1) / LN2

    def ceiling(self) -> Tensor:
        """K - L_null if all terms were 0, in bits per dimension: no network can exceed it
        [SD15 Eq. 14].

        H_q(XT | X0) - H_q(X1 | X0) - H_p(XT) - L_null = ½ log2((1-ᾱ_T)/β_1)
        """
        r = self.rates()
        return (r.noise_rate[-1].log2() - r.spread[1].log2()).view(())

    def loss(self, model: Network, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """L_null - K in bits per dimension, (B,), estimated from one t per image [SD15 Eq. 14].

        t must be drawn uniformly from 2..T, so that the term at t has the weight T - 1. With
        `draw_times`, multiply `vlb_term` by the weight that it returns instead.
        """
        return (self.num_timesteps - 1) * self.vlb_term(model, x0, t, eps) - self.ceiling()

    @torch.no_grad()
    def bits_per_dim(self, model: Network, x0: Tensor, num_terms: int | None = None) -> BitsPerDim:
        """The bound on x0 (B, C, H, W), each image with its own noise [SD15 Eq. 14].

        All T - 1 terms, or an unbiased estimate from `num_terms` of them: one t from each of
        num_terms parts of 2..T, drawn for each image and weighted by the part's length. The
        standard error of the mean over images is total.std() / √B.
        """
        total = (-L_NULL - self.ceiling()).expand(len(x0)).clone()
        terms, times = [], []
        for first, last in pairwise(strata(self.num_timesteps, num_terms)):
            t = torch.randint(first, last, (len(x0),), device=x0.device)
            term = self.vlb_term(model, x0, t, torch.randn_like(x0))
            total += (last - first) * term
            terms.append(term)
            times.append(t)
        return BitsPerDim(total, torch.stack(terms, 1), torch.stack(times, 1))

    @torch.no_grad()
    def p_sample(
        self,
        model: Network,
        xt: Tensor,
        t: int,
        evidence: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One reverse step, t > 1: x_{t-1} from xt. With evidence (y, noise_var) it is a step of
        the perturbed process [SD15 Section 2.5.2]."""
        t_batch = torch.full((len(xt),), t, device=xt.device)
        p = self.p_mean_variance(model(xt, t_batch), xt, t_batch)
        if evidence is not None:
            p = multiply(p, *evidence)
        return p.mean + torch.exp(0.5 * p.log_var) * torch.randn_like(xt)

    def trajectory(
        self, model: Network, x_T: Tensor, evidence: tuple[Tensor, Tensor] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """From noise x_T (B, C, H, W) to x_1: yields (t, xt), t = T-1 ... 1 [SD15 Section 2.2].

        Differs: it omits the paper's p(x0 | x1), as the authors' code does. That step is not
        learned: it would add noise of variance β_1 to x_1, which contains as much noise already.
        """
        xt = x_T
        for t in range(self.num_timesteps, 1, -1):
            xt = self.p_sample(model, xt, t, evidence)
            yield t - 1, xt

    def sample(self, model: Network, x_T: Tensor) -> Tensor:
        """The images at the end of the trajectory from x_T (B, C, H, W)."""
        return last_images(self.trajectory(model, x_T))

    def posterior_trajectory(
        self, model: Network, y: Tensor, noise_var: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Draws from p(x0) r(x0), normalised, with r(x) = N(y; x, noise_var), by the perturbed
        process p̃(xt) ∝ p(xt) r(xt): yields (t, xt), t = T-1 ... 1 [SD15 Section 2.5].

        y, noise_var (B, C, H, W). Inpainting: noise_var is 0 where the pixel is known and ∞ where
        it is missing. Denoising: it is the variance of the noise everywhere. r is the same at every
        t, as in the paper, so the evidence is counted more than once.
        Differs: xT is drawn from π r, as in Section 2.5.1; the authors' code starts at y.
        """
        prior = Gaussian(torch.zeros_like(y), torch.zeros_like(y))
        start = multiply(prior, y, noise_var)
        x_T = start.mean + torch.exp(0.5 * start.log_var) * torch.randn_like(y)
        return self.trajectory(model, x_T, (y, noise_var))

    def posterior_sample(self, model: Network, y: Tensor, noise_var: Tensor) -> Tensor:
        """The images at the end of a posterior trajectory."""
        return last_images(self.posterior_trajectory(model, y, noise_var))


def strata(T: int, num_terms: int | None = None) -> list[int]:
    """Edges that cut the times 2..T into num_terms parts [edge, next edge), by default T - 1.

    The lengths of the parts grow in proportion to t, as far as whole numbers allow. The terms of
    the bound fall roughly like 1/t, so all parts contribute about equally.
    """
    parts = T - 1 if num_terms is None else num_terms
    if not 1 <= parts < T:
        raise UserError(f"{parts} strata of the times 2..{T}: there must be 1 to {T - 1}")
    edges = [2]
    for k in range(1, parts):
        even = round(2 * ((T + 1) / 2) ** (k / parts))
        edges.append(min(max(even, edges[-1] + 1), T + 1 - (parts - k)))
    return [*edges, T + 1]


def draw_times(batch_size: int, edges: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """A t for each image, and the weight of its term: t, weight (B,). The expected value of
    weight * term is the sum of the terms over t.

    The images take the parts [edge, next edge) of 2..T in turn, starting with a random one. Each
    draws its t uniformly from its part. With N parts, t has probability 1/(N length), so its weight
    is N length.
    """
    lower = torch.tensor(edges[:-1], device=device)
    length = torch.tensor(edges[1:], device=device) - lower
    part = torch.arange(batch_size, device=device)
    part = (part + torch.randint(len(lower), (), device=device)) % len(lower)
    within = (torch.rand(batch_size, device=device) * length[part]).long()
    t = lower[part] + within.clamp(max=length[part] - 1)
    return t, length[part].float() * len(lower)


class Pair(nn.Module):
    """A network and its process as one module, since learned rates are trained, averaged and saved
    with the network's weights. It is called like the network."""

    network: nn.Module
    process: DPM

    def __init__(self, network: nn.Module, process: DPM) -> None:
        super().__init__()
        self.network, self.process = network, process

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        return self.network(xt, t)
