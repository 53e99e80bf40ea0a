"""What guidance does, where everything is known: one number x, with x | c ~ N(c, 1), c ~ N(0, 1).

The density p(x) p(c | x)^s is then a Gaussian, and so is what the sampler draws with perfect noise
estimates. The two are not the same. Prints both, and writes guidance.svg: the geometry of a step,
and the densities.
"""

import math

from common import cli
from common.files import output_folder
from common.options import ScriptOptions
from common.svg import BLUE, GREY, ORANGE, RED, Drawings, arrow, line, page, save, text, through
from lesson_05.ddpm import DDPM, Gaussian, linear_beta
from lesson_05.guidance import Guided

import torch
from torch import Tensor


def main(scales: list[float] | None = None, options: ScriptOptions = ScriptOptions()) -> None:
    """Print mean and variance of the density and of the samples, for c = 1; write guidance.svg.

    Args:
        scales: of guidance; 1, 2, 4 and 8 unless given.
    """
    process = DDPM(linear_beta(1000))  # nothing is drawn: the moments are computed
    print("| s | the density | the samples | with 20 Langevin steps at each t |\n|---|---|---|---|")
    for s in scales or [1.0, 2.0, 4.0, 8.0]:
        results = density(s), sampled(process, s), sampled(process, s, 20)
        print(f"| {s:g} | " + " | ".join(f"{m:.3f}, {v:.3f}" for m, v in results) + " |")
    save(DRAWINGS, output_folder(options.output_dir, "lesson_05.class_conditional"))


def density(s: float, c: float = 1.0) -> tuple[float, float]:
    """Mean and variance of p(x) p(c | x)^s, that is of N(0, 2) times N(c; x/2, 1/2)^s."""
    return 2 * s * c / (1 + s), 2 / (1 + s)


def exact_noise(process: DDPM, xt: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """E[ε | xt, c], and E[ε | xt] where c is nan. xt (B, 1, 1, 1), c (B,).

    xt | c is N(√ᾱ_t c, 1) and xt is N(0, 1 + ᾱ_t); E[ε] = -√(1-ᾱ_t) times the score.
    """
    signal, noise, c = process.signal_rate[t], process.noise_rate[t], c.view(-1, 1, 1, 1)
    return noise * torch.where(c.isnan(), xt / (1 + signal**2), xt - signal * c)


def sampled(
    process: DDPM, s: float, corrections: int = 0, step: float = 0.1, c: float = 1.0
) -> tuple[float, float]:
    """Mean and variance of what Algorithm 2 draws with guidance s and the exact noise estimate.

    Each step is affine in xt, so two points tell what it does to mean and variance. Corrections:
    that many Langevin steps at each t, which leave p(xt) p(c | xt)^s as it is, up to their size.
    """

    def model(xt: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return exact_noise(process, xt, t, condition)

    network = Guided(model, s, torch.tensor([c, c]), torch.tensor([math.nan, math.nan]))
    points, mean, variance = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), 0.0, 1.0
    for time in range(process.num_timesteps, 0, -1):
        t = torch.full((2,), time)
        eps_hat = network(points, t)
        at_0, at_1 = (-eps_hat / process.noise_rate[t]).flatten().tolist()  # the guided score
        size = step / (at_0 - at_1)
        for _ in range(corrections):
            mean += size / 2 * (at_0 + (at_1 - at_0) * mean)
            variance = (1 + size / 2 * (at_1 - at_0)) ** 2 * variance + size
        p: Gaussian = process.p_mean_variance(eps_hat, points, t, clip_x0=False)
        at_0, at_1 = p.mean.flatten().tolist()
        mean, variance = at_0 + (at_1 - at_0) * mean, (at_1 - at_0) ** 2 * variance
        if time > 1:
            variance += p.log_var[0].exp().item()
    return mean, variance


def guidance(s: float = 4.0) -> str:
    """Left, the geometry of one step; right, what the steps draw, over x."""
    return page(820, 330, [*step_panel(), *density_panel(s)])


def step_panel() -> list[str]:
    """The two estimates as arrows, and the guided one on the line through them, for s = 2."""
    at = [(150 + 80 * s, 110 + 40 * s) for s in (0, 1, 2)]
    names = ["ε(x_{t}, ∅), s = 0", "ε(x_{t}, c), s = 1", "guided, s = 2"]
    parts = [
        text(24, 32, "One step: two estimates of the noise", size=16, anchor="start"),
        line("M150 110L364 217", GREY, dashed=True, head=False),
    ]
    for (x, y), name, colour in zip(at, names, (BLUE, ORANGE, RED), strict=True):
        parts += [arrow(60, 270, x, y, colour), text(x + 8, y - 12, name, colour, anchor="start")]
    return [*parts, text(48, 290, "x_{t}")]


def density_panel(s: float) -> list[str]:
    """The four densities over x."""
    left, bottom, scale, low, high = 450, 270, 40, -4.0, 4.5  # scale: points for each unit of x
    curves = [
        (0.0, 2.0, GREY, "p(x)"),
        (1.0, 1.0, ORANGE, "p(x | c = 1)"),
        (*density(s), BLUE, f"p(x) p(c | x)ˢ, s = {s:g}"),
        (*sampled(DDPM(linear_beta(1000)), s), RED, f"sampled with s = {s:g}"),
    ]
    parts = [
        text(left, 32, "An example where everything is known", size=16, anchor="start"),
        line(f"M{left} {bottom}h340", GREY, head=False, width=1),
    ]
    for x in range(-4, 5, 2):
        parts.append(text(left + scale * (x - low), bottom + 20, f"{x}".replace("-", "−"), GREY))
    for number, (mean, variance, colour, name) in enumerate(curves):
        xs = torch.linspace(low, high, 171)
        ys = torch.exp(-((xs - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        points = zip(
            (left + scale * (xs - low)).tolist(), (bottom - 250 * ys).tolist(), strict=True
        )
        parts.append(line(through(points), colour, dashed=colour == RED, head=False))
        parts.append(text(left, 64 + 22 * number, name, colour, anchor="start"))
    return parts


DRAWINGS: Drawings = {"guidance.svg": guidance}


if __name__ == "__main__":
    cli.run(main)
