"""Deep Unsupervised Learning using Nonequilibrium Thermodynamics, Sohl-Dickstein, Weiss,
Maheswaranathan & Ganguli 2015 (arXiv 1503.03585), "SD15": Gaussian diffusion.

The paper's x^(t) is xt here. The time t counts as in the paper: x0 is the data, of unit variance,
xT is noise, and slot 0 of every table belongs to the data. Tables have shape (T+1, 1, 1, 1), so
that table[t] of t (B,) multiplies images (B, C, H, W). A point of the plane is (B, 2, 1, 1).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

Network = Callable[[Tensor, Tensor], Tensor]
Number = TypeVar("Number", float, Tensor)
NUM_BUMPS = 10
LN2 = math.log(2)
L_NULL = -0.5 * math.log2(2 * math.pi * math.e)  # bits that N(0, 1) says of a value of variance 1


class Gaussian(NamedTuple):
    """Independent normals, one a pixel: mean (B, C, H, W) and the natural log of the variance."""

    mean: Tensor
    log_var: Tensor


class Bound(NamedTuple):
    """K - L_null, in bits per pixel, all channels together, for each image.

    total: (B,). terms, t: (B, N), the KL divergences that were computed and their t; the total is
    the ceiling minus the sum of all T - 1 of them, estimated where N < T - 1.
    """

    total: Tensor
    terms: Tensor
    t: Tensor


class Rates(NamedTuple):
    """All that the steps know of β: float32 (T+1, 1, 1, 1)."""

    log_odds: Tensor  # log β_t/(1-β_t)
    decay: Tensor  # √(1-β_t)
    spread: Tensor  # √β_t
    signal_rate: Tensor  # √ᾱ_t, ᾱ_t the product of all 1-β up to t
    noise_rate: Tensor  # √(1-ᾱ_t)
    post_x0: Tensor  # what x0 and xt weigh in the posterior's mean
    post_xt: Tensor
    post_log_var: Tensor


class Standard(NamedTuple):
    """From images to data of mean 0 and variance 1, and back: one mean and one deviation for all
    pixels, in the levels 0..255."""

    mean: float
    std: float

    def encode(self, images: Tensor, dequantize: bool = True) -> Tensor:
        """Images in [-1, 1] to x0: standardised, each level spread evenly over its width
        [SD15, the code].

        x0 = (level + u - mean) / std,  u ~ U(-½, ½)

        Without u the data are discrete: a model could learn the 8-bit grid, and K without end.
        """
        levels = images * 127.5 + 127.5
        if dequantize:
            levels = levels + torch.rand_like(levels) - 0.5
        return (levels - self.mean) / self.std

    def decode(self, x0: Tensor) -> Tensor:
        """x0 to images on the scale [-1, 1]."""
        return (x0 * self.std + self.mean) / 127.5 - 1

    def bits_per_dim(self, gain: Number, channels: int) -> Number:
        """What one 8-bit value costs by a bound K - L_null of `gain` bits per pixel.

        The level's mass is the density of x0, averaged over its width 1/std: at least K bits and
        log2(1/std) more [Jensen].
        """
        return math.log2(self.std) - L_NULL - gain / channels


def standard(levels: Tensor) -> Standard:
    """The mean and deviation of a data set (N, C, H, W) of levels 0..255."""
    count = torch.bincount(levels.flatten(), minlength=256).double()
    value, share = torch.arange(256.0, dtype=torch.float64), count / count.sum()
    mean = (share * value).sum()
    std = (share * (value - mean) ** 2).sum().sqrt()
    if std == 0:
        raise UserError("the training images are of one grey: there is nothing to standardise")
    return Standard(mean.item(), std.item())


def erasing_beta(T: int) -> Tensor:
    """Variances of the T forward steps, each of which erases about 1/T of the variance that the
    data had at first [SD15 Section 2.4.1, the code]; for binary data in the paper, whose second
    footnote finds it as good for these.

    β_t = m_t + (1 - m_t - 1e-5) / (T, ..., 2)_t,  m_1 = 0.001001,  m_t = 0.000001 after it

    float64 (T,): 1/T, rising to 1/2. The divisors fall evenly from T to 2.
    """
    if T < 2:
        raise UserError(f"num_timesteps is {T}: it must be at least 2")
    least = torch.full((T,), 1e-6, dtype=torch.float64)
    least[0] += 1e-3
    return least + (1 - least - 1e-5) / torch.linspace(T, 2, T, dtype=torch.float64)


def bumps(T: int) -> Tensor:
    """Ten bumps along the time, that sum to one at every t [SD15 Appendix D.2].

    g_j(t) = exp(-(t - τ_j)²/(2w²)) / Σ_k exp(-(t - τ_k)²/(2w²)),  τ_j evenly from 1 to T

    float32 (T+1, 10); slot 0 is that of t = 1.
    Differs: the width w is half of the way from bump to bump, as in the authors' code; the paper
    has all of it.
    """
    t = torch.arange(T + 1, dtype=torch.float64).clamp(min=1)
    centre = torch.linspace(1, T, NUM_BUMPS, dtype=torch.float64)
    width = (T - 1) / (NUM_BUMPS - 1) / 2
    return torch.softmax(-(((t[:, None] - centre) / width) ** 2) / 2, dim=1).float()


def rates(beta: Tensor) -> Rates:
    """All tables from float64 beta (T,), with the derivatives by beta."""
    one, zero = beta.new_ones(1), beta.new_zeros(1)
    alpha_bar = torch.cat([one, (1 - beta).cumprod(0)])
    noise = 1 - alpha_bar[1:]
    before = 1 - alpha_bar[:-1]
    post_x0 = alpha_bar[:-1].sqrt() * beta / noise
    post_xt = (1 - beta).sqrt() * before / noise
    # The posterior at t = 1 is the point x0 itself, and no step of the model: slot 2 stands in.
    post_log_var = (before[1:] / noise[1:] * beta[1:]).log()
    tables = Rates(
        log_odds=torch.cat([zero, beta.logit()]),
        decay=torch.cat([one, (1 - beta).sqrt()]),
        spread=torch.cat([zero, beta.sqrt()]),
        signal_rate=alpha_bar.sqrt(),
        noise_rate=torch.cat([zero, noise.sqrt()]),
        post_x0=torch.cat([one, post_x0]),
        post_xt=torch.cat([zero, post_xt]),
        post_log_var=torch.cat([post_log_var[:1], post_log_var[:1], post_log_var]),
    )
    return Rates(*(table.float().view(-1, 1, 1, 1) for table in tables))


def kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL divergence from q to p, in nats per element.

    KL(p || q) = ½ [log(σq²/σp²) + (σp² + (μp - μq)²) / σq² - 1]
    """
    log_ratio = p.log_var - q.log_var
    return 0.5 * (log_ratio.exp() - log_ratio - 1 + (p.mean - q.mean) ** 2 / q.log_var.exp())


def multiply(p: Gaussian, y: Tensor, noise_var: Tensor) -> Gaussian:
    """p(x) N(y; x, noise_var), normalised: p after evidence y about x [SD15 Section 2.5.3].

    w = var/(var + noise_var),  mean' = mean + w (y - mean),  var' = (1 - w) var

    noise_var (B, C, H, W): 0 where x is known to be y, which then is the mean exactly, with
    variance 0; infinite where nothing is known of x.
    """
    weight = p.log_var.exp() / (p.log_var.exp() + noise_var)
    return Gaussian(torch.lerp(p.mean, y, weight), p.log_var + torch.log1p(-weight))


class DPM(nn.Module):
    """The forward process q, its posterior, the reverse process p, their bound, and sampling.

    Args:
        beta: float64 (T,), the variances of the forward steps.
        learned: whether β_2..β_T are parameters, to be trained with the network by the same bound;
            beta is then where they start [SD15 Section 2.4.1].
    """

    def __init__(self, beta: Tensor, learned: bool = False) -> None:
        super().__init__()
        self.num_timesteps = T = len(beta)
        self.log_odds = beta.double().logit()
        self.bumps = bumps(T)[1:].double()
        self.bumps[0] = 0  # β_1 stays: it is what keeps the bound finite
        self.shift = nn.Parameter(torch.zeros(NUM_BUMPS)) if learned else None
        for name, table in rates(beta.double())._asdict().items():
            self.register_buffer(f"fixed_{name}", table, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.get_buffer("fixed_decay").device

    def beta(self) -> Tensor:
        """β_1..β_T, float64 (T,). Learned ones are σ(logit β_t + Σ_j g_j(t) shift_j), t > 1."""
        if self.shift is None:
            return self.log_odds.sigmoid()
        return torch.sigmoid(self.log_odds + self.bumps @ self.shift.cpu().double())

    def rates(self) -> Rates:
        if self.shift is None:
            return Rates(*(self.get_buffer(f"fixed_{name}") for name in Rates._fields))
        return Rates(*(table.to(self.device) for table in rates(self.beta())))

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """t steps of noise at once: xt = √ᾱ_t x0 + √(1-ᾱ_t) ε [SD15 Section 2.1]."""
        r = self.rates()
        return r.signal_rate[t] * x0 + r.noise_rate[t] * eps

    def q_posterior(self, x0: Tensor, xt: Tensor, t: Tensor) -> Gaussian:
        """q(x_{t-1} | xt, x0), t > 1: one step back if the data were known [SD15 Eq. 14].

        mean √ᾱ_{t-1} β_t/(1-ᾱ_t) x0 + √(1-β_t) (1-ᾱ_{t-1})/(1-ᾱ_t) xt,
        variance (1-ᾱ_{t-1})/(1-ᾱ_t) β_t
        """
        r = self.rates()
        mean = r.post_x0[t] * x0 + r.post_xt[t] * xt
        return Gaussian(mean, r.post_log_var[t].expand_as(mean))

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor) -> Gaussian:
        """p(x_{t-1} | xt), t > 1, from out = model(xt, t) = (μ, b) [SD15 Eq. 64, 65, the code].

        mean xt √(1-β_t) + μ √β_t,  variance σ(b/√T + logit β_t)

        out (B, 2C, H, W). A network that answers 0 is the forward step.
        Differs: the paper has the mean (xt - μ)(1 - variance) + μ, and b instead of b/√T.
        """
        r = self.rates()
        mu, b = out.chunk(2, dim=1)
        mean = r.decay[t] * xt + r.spread[t] * mu
        return Gaussian(mean, F.logsigmoid(b / math.sqrt(self.num_timesteps) + r.log_odds[t]))

    def term(self, model: Network, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """KL(q(x_{t-1} | xt, x0) || p(x_{t-1} | xt)), t > 1, in bits per pixel, (B,)
        [SD15 Eq. 14].

        Of learned rates, too, it has the derivatives: eps is drawn first, "frozen", and xt a
        function of it and of β [SD15 Section 2.4.1].
        """
        xt = self.q_sample(x0, t, eps)
        p = self.p_mean_variance(model(xt, t), xt, t)
        nats = kl(self.q_posterior(x0, xt, t), p)
        return nats.sum(1).flatten(1).mean(1) / LN2

    def ceiling(self, channels: int) -> Tensor:
        """K - L_null if all terms were 0, from the entropies, in bits per pixel [SD15 Eq. 14].

        H_q(XT | X0) - H_q(X1 | X0) - H_p(XT) - L_null = ½ log2((1-ᾱ_T)/β_1) a value
        """
        r = self.rates()
        ratio = r.noise_rate[-1].log2() - r.spread[1].log2()
        return channels * ratio.view(())

    def loss(self, model: Network, x0: Tensor, t: Tensor, eps: Tensor, weight: Tensor) -> Tensor:
        """L_null - K in bits per pixel, (B,), estimated from one t an image [SD15 Eq. 14].

        With t, weight (B,) from `draw_times` its mean over t and eps is L_null - K itself.
        """
        return weight * self.term(model, x0, t, eps) - self.ceiling(x0.shape[1])

    @torch.no_grad()
    def bound(self, model: Network, x0: Tensor, num_terms: int | None = None) -> Bound:
        """K - L_null on x0 (B, C, H, W), each image with its own noise [SD15 Eq. 14].

        All T - 1 terms, or one t from each of num_terms parts of 2..T, drawn for each image and
        weighted by the length of its part. Unbiased; the standard error of the mean over images
        is total.std() / √B.
        """
        total = self.ceiling(x0.shape[1]).expand(len(x0)).clone()
        terms, times = [], []
        for first, last in pairwise(strata(self.num_timesteps, num_terms)):
            t = torch.randint(first, last, (len(x0),), device=x0.device)
            term = self.term(model, x0, t, torch.randn_like(x0))
            total -= (last - first) * term
            terms.append(term)
            times.append(t)
        return Bound(total, torch.stack(terms, 1), torch.stack(times, 1))

    @torch.no_grad()
    def p_sample(
        self,
        model: Network,
        xt: Tensor,
        t: int,
        evidence: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One step back, x_{t-1} from xt, t > 1; with evidence (y, noise_var), a step of the
        perturbed process [SD15 Section 2.5.2]."""
        t_batch = torch.full((len(xt),), t, device=xt.device)
        p = self.p_mean_variance(model(xt, t_batch), xt, t_batch)
        if evidence is not None:
            p = multiply(p, *evidence)
        return p.mean + torch.exp(0.5 * p.log_var) * torch.randn_like(xt)

    def sample(
        self,
        model: Network,
        x_T: Tensor,
        evidence: tuple[Tensor, Tensor] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """From noise x_T (B, C, H, W) to x_1, in T - 1 steps [SD15 Section 2.2].

        on_step(t - 1, x_{t-1}) sees every image on the way.
        Differs: the paper's p(x0 | x1), a step of π that adds noise of variance β_1 to what has as
        much already, is left out, as in the authors' code.
        """
        xt = x_T
        for t in range(self.num_timesteps, 1, -1):
            xt = self.p_sample(model, xt, t, evidence)
            if on_step is not None:
                on_step(t - 1, xt)
        return xt

    def posterior_sample(
        self,
        model: Network,
        y: Tensor,
        noise_var: Tensor,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draws from p(x0) r(x0), r(x) = N(y; x, noise_var), by the perturbed process
        p̃(xt) ∝ p(xt) r(xt) [SD15 Section 2.5].

        y, noise_var (B, C, H, W): inpainting has noise_var 0 where the pixel is known and ∞ where
        it is not, denoising the variance of the noise everywhere. r is the same at every t, the
        paper's choice; it then counts the evidence more than once.
        Differs: xT comes from π r, as Section 2.5.1 has it; the authors' code starts at y.
        """
        prior = Gaussian(torch.zeros_like(y), torch.zeros_like(y))
        start = multiply(prior, y, noise_var)
        x_T = start.mean + torch.exp(0.5 * start.log_var) * torch.randn_like(y)
        return self.sample(model, x_T, (y, noise_var), on_step)


def strata(T: int, num_terms: int | None = None) -> list[int]:
    """Edges that cut the times 2..T into num_terms parts [edge, next edge), T - 1 unless given.

    The parts are longer the later they are, in proportion to t where whole numbers allow it: the
    terms of the bound fall about like 1/t, so that each part weighs about the same.
    """
    parts = T - 1 if num_terms is None else num_terms
    if not 1 <= parts < T:
        raise UserError(f"{parts} terms of the bound: take 1 to {T - 1} of its {T - 1} terms")
    edges = [2]
    for k in range(1, parts):
        even = round(2 * ((T + 1) / 2) ** (k / parts))
        edges.append(min(max(even, edges[-1] + 1), T + 1 - (parts - k)))
    return [*edges, T + 1]


def draw_times(batch_size: int, edges: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """A t for each image, and what to multiply its term by so that the mean is the sum over t.

    Each image takes a part [edge, next edge) of the times, the parts in turn from a random one on,
    and a t in it. With N parts t has probability 1/(N length), the weight is N length: unbiased.
    """
    lower = torch.tensor(edges[:-1], device=device)
    length = torch.tensor(edges[1:], device=device) - lower
    part = torch.arange(batch_size, device=device)
    part = (part + torch.randint(len(lower), (), device=device)) % len(lower)
    within = (torch.rand(batch_size, device=device) * length[part]).long()
    t = lower[part] + within.clamp(max=length[part] - 1)
    return t, length[part].float() * len(lower)


class Pair(nn.Module):
    """A network and its process, to be averaged and saved together: learned rates are parameters
    as well. Called like the network."""

    network: nn.Module
    process: DPM

    def __init__(self, network: nn.Module, process: DPM) -> None:
        super().__init__()
        self.network, self.process = network, process

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        return self.network(xt, t)
