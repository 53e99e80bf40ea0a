"""What guidance does, where everything is known: one number x, with x | c ~ N(c, 1), c ~ N(0, 1).

The density p(x) p(c | x)^s is then a Gaussian, and so is what the sampler draws with perfect noise
estimates. The two are not the same. Prints both, and writes guidance.svg: the geometry of a step,
and the densities.
"""

import math

from common import cli
from common.files import output_folder
from common.options import ScriptOptions
from lesson_05.ddpm import DDPM, Gaussian, linear_beta
from lesson_05.guidance import Guided

import torch
from torch import Tensor

GREY, BLUE, ORANGE, RED = "#6b7280", "#2563eb", "#d97706", "#dc2626"


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
    folder = output_folder(options.output_dir, "lesson_05.class_conditional")
    (folder / "guidance.svg").write_text(drawing(process), encoding="utf-8")
    print(f"{folder}/guidance.svg")


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


def drawing(process: DDPM, s: float = 4.0) -> str:
    """The picture, as SVG on a white card, so that it is legible on any background."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 330" width="820" height="330" '
        'font-family="sans-serif" font-size="14">',
        '<rect width="820" height="330" rx="8" fill="#ffffff"/>',
        *step_panel(),
        *density_panel(process, s),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def text(x: float, y: float, words: str, colour: str = "#111827", size: int = 14) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}" font-size="{size}">{words}</text>'


def arrow(
    start: tuple[float, float], end: tuple[float, float], colour: str, dashed: bool = False
) -> str:
    """A line with a head at its end."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    wings = [
        f"{end[0] - 11 * math.cos(angle + turn):.1f},{end[1] - 11 * math.sin(angle + turn):.1f}"
        for turn in (0.4, -0.4)
    ]
    dash = ' stroke-dasharray="6 5"' if dashed else ""
    return (
        f'<path d="M{start[0]:.1f},{start[1]:.1f} L{end[0]:.1f},{end[1]:.1f}" fill="none" '
        f'stroke="{colour}" stroke-width="2.5"{dash}/>'
        f'<polygon points="{end[0]:.1f},{end[1]:.1f} {wings[0]} {wings[1]}" fill="{colour}"/>'
    )


def step_panel() -> list[str]:
    """The two estimates as arrows, and the guided one on the line through them, for s = 2."""
    origin, null, conditional = (60.0, 270.0), (150.0, 110.0), (230.0, 150.0)
    guided = tuple(n + 2 * (c - n) for n, c in zip(null, conditional, strict=True))
    return [
        text(24, 32, "One step: two estimates of the noise", size=16),
        arrow(null, (guided[0], guided[1]), GREY, dashed=True),
        arrow(origin, null, BLUE),
        arrow(origin, conditional, ORANGE),
        arrow(origin, (guided[0], guided[1]), RED),
        f'<circle cx="{origin[0]:.0f}" cy="{origin[1]:.0f}" r="5" fill="#111827"/>',
        text(40, 300, "xₜ"),
        text(96, 96, "ε(xₜ, ∅), s = 0", BLUE),
        text(228, 138, "ε(xₜ, c), s = 1", ORANGE),
        text(272, 228, "guided, s = 2", RED),
    ]


def density_panel(process: DDPM, s: float) -> list[str]:
    """The four densities over x."""
    left, right, bottom, width, height = 450, 790, 270, 340, 200
    low, high, top = -4.0, 4.5, 0.8
    curves = [
        (0.0, 2.0, GREY, "", "p(x)"),
        (1.0, 1.0, ORANGE, "", "p(x | c = 1)"),
        (*density(s), BLUE, "", f"p(x) p(c | x)ˢ, s = {s:g}"),
        (*sampled(process, s), RED, ' stroke-dasharray="6 4"', f"sampled with s = {s:g}"),
    ]
    parts = [
        text(450, 32, "The densities, where all is known", size=16),
        f'<path d="M{left},{bottom} H{right}" stroke="{GREY}" stroke-width="1"/>',
    ]
    for tick in range(-4, 5, 2):
        at = left + width * (tick - low) / (high - low)
        parts.append(text(at - 5, bottom + 20, f"{tick}".replace("-", "−"), GREY))
    for number, (mean, variance, colour, dash, name) in enumerate(curves):
        points = []
        for k in range(171):
            x = low + (high - low) * k / 170
            y = math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
            points.append(f"{left + width * k / 170:.1f},{bottom - height * y / top:.1f}")
        parts.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" '
            f'stroke-width="2.5"{dash}/>'
        )
        parts.append(text(left, 64 + 22 * number, name, colour))
    return parts


if __name__ == "__main__":
    cli.run(main)
