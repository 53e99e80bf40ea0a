"""Denoising Diffusion Implicit Models, Song, Meng & Ermon 2021 (arXiv 2010.02502), "Song21".

A network that was trained as in lesson 5, sampled in S of the T steps, with as much or as little
noise as one likes. Nothing here is trained and nothing is kept: these are functions of a network
that estimates the noise, eps_hat = model(xt, t), and of lesson 5's process.

The paper's α_t is lesson 5's ᾱ_t, and that is what it is called here. The paper's τ_1 < ... < τ_S
are the times at which the network is asked; s < t are two neighbours among 0, τ_1, ..., τ_S.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from common.errors import UserError
from lesson_05.ddpm import DDPM, Network

Spacing = Literal["uniform", "quadratic", "trailing"]


def ddim_timesteps(T: int, S: int, spacing: Spacing = "uniform") -> list[int]:
    """The times τ_1 < ... < τ_S at which the network is asked [Song21 Section 4.2, Appendix D.2].

    uniform: τ_i = 1 + (i-1) ⌊T/S⌋.  quadratic: τ_i = 1 + ⌊0.8 T ((i-1)/(S-1))²⌋, dense near the
    image.  trailing: τ_i = i T/S to the nearest, so that the first step starts at T.

    S distinct integers in 1..T, ascending; S = 1 is T alone.
    Differs: the authors' loop over the stride runs more than S steps where S does not divide T;
    here it stops after S. Times of the quadratic rule that fall together are moved up. Trailing is
    not in the paper.
    """
    if not 1 <= S <= T:
        raise UserError(f"num_steps is {S}: take 1 to {T}, the steps that the network learned")
    if spacing not in get_args(Spacing):
        raise UserError(f"spacing {spacing!r} is not known: take {', '.join(get_args(Spacing))}")
    if S == 1:
        return [T]
    if spacing == "uniform":
        return [1 + i * (T // S) for i in range(S)]
    if spacing == "trailing":
        return [round(i * T / S) for i in range(1, S + 1)]
    times: list[int] = []
    for i in range(S):
        t = 1 + 4 * T * i**2 // (5 * (S - 1) ** 2)
        times.append(max(t, times[-1] + 1) if times else t)
    return times


def ddim_sigma(alpha_bar_t: float, alpha_bar_s: float, eta: float) -> float:
    """The standard deviation of the noise that a step from t to s adds [Song21 Eq. 16].

    σ = η √((1-ᾱ_s)/(1-ᾱ_t)) √(1 - ᾱ_t/ᾱ_s)

    η = 0 is DDIM. η = 1 is DDPM's √β̃, of all steps between t and s at once. 0 for s = 0.
    """
    check_eta(eta)
    if eta == 0:
        return 0.0
    return eta * math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))


def check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}: take 0, no noise, to 1, the noise of DDPM")


def ddim_step(
    xt: Tensor,
    eps_hat: Tensor,
    alpha_bar_t: float,
    alpha_bar_s: float,
    eta: float = 0.0,
    sigma_hat: bool = False,
) -> Tensor:
    """From xt straight to xs: the estimated image, noised again to the level of s [Song21 Eq. 12].

    xs = √ᾱ_s x̂0 + √(1-ᾱ_s-σ²) ε̂ + σ z,  x̂0 = (xt - √(1-ᾱ_t) ε̂)/√ᾱ_t [Eq. 9],  z ~ N(0, 1)

    Of the noise in xs the share σ is new and the rest is what was in xt, so that xs is as noisy as
    the network knows it [Song21 Eq. 7, Lemma 1]; ᾱ_s = 1 is the image.
    With η = 0 the step can be taken upwards, too, to a noisier s [Song21 Eq. 13].

    sigma_hat, with η = 1: multiplies z by the larger σ̂ = √(1 - ᾱ_t/ᾱ_s), √β of DDPM, except in
    the last step, which adds no noise [Song21 Section 5; as in the code, σ stays in the root].
    """
    sigma = ddim_sigma(alpha_bar_t, alpha_bar_s, eta)
    if sigma_hat and eta != 1:
        raise UserError(f"sigma_hat goes with eta 1, not {eta}")
    x0_hat = (xt - math.sqrt(1 - alpha_bar_t) * eps_hat) / math.sqrt(alpha_bar_t)
    kept = math.sqrt(max(1 - alpha_bar_s - sigma**2, 0.0))
    mean = math.sqrt(alpha_bar_s) * x0_hat + kept * eps_hat
    if sigma == 0:
        return mean
    scale = math.sqrt(1 - alpha_bar_t / alpha_bar_s) if sigma_hat else sigma
    return mean + scale * torch.randn_like(xt)


@torch.no_grad()
def ddim_sample(
    model: Network,
    process: DDPM,
    x_T: Tensor,
    num_steps: int = 50,
    eta: float = 0.0,
    spacing: Spacing = "uniform",
    clip_x0: bool = False,
    sigma_hat: bool = False,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """From noise x_T (B, C, H, W) to images in num_steps steps [Song21 Section 4.2].

    With η = 0 the images are a function of x_T: no other random number is drawn.
    on_step(s, xs) sees every image on the way, the last one at s = 0.

    clip_x0: x̂0 is clipped to [-1, 1], and ε̂ is what xt then holds besides it.
    """
    times = [0, *ddim_timesteps(process.num_timesteps, num_steps, spacing)]
    xt = x_T
    for s, t in reversed(list(pairwise(times))):
        alpha_bar_t, alpha_bar_s = process.alpha_bar[[t, s]].tolist()
        eps_hat = model(xt, torch.full((len(xt),), t, device=xt.device))
        if clip_x0:
            eps_hat = clip_eps(xt, eps_hat, alpha_bar_t)
        xt = ddim_step(xt, eps_hat, alpha_bar_t, alpha_bar_s, eta, sigma_hat)
        if on_step is not None:
            on_step(s, xt)
    return xt


def clip_eps(xt: Tensor, eps_hat: Tensor, alpha_bar_t: float) -> Tensor:
    """The noise in xt if its image is x̂0 clipped to [-1, 1] [Song21 Eq. 9, there and back].

    Differs: the paper does not clip.
    """
    signal_rate, noise_rate = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
    x0_hat = ((xt - noise_rate * eps_hat) / signal_rate).clamp(-1, 1)
    return (xt - signal_rate * x0_hat) / noise_rate


@torch.no_grad()
def ddim_encode(
    model: Network,
    process: DDPM,
    x0: Tensor,
    num_steps: int = 50,
    spacing: Spacing = "uniform",
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The noise (B, C, H, W) that ddim_sample with η = 0 turns into x0, all but an error that
    falls as num_steps grows: the same steps, upwards [Song21 Section 4.3, 5.4].

    Each step is one of Euler's method for an ODE [Song21 Eq. 14]; upwards it takes ε̂ at its lower
    end, downwards at its upper end, and that is the error. The network was told of no t = 0: the
    first step asks it at t = 1. on_step(t, xt) sees every image on the way.
    """
    times = [0, *ddim_timesteps(process.num_timesteps, num_steps, spacing)]
    xs = x0
    for s, t in pairwise(times):
        alpha_bar_s, alpha_bar_t = process.alpha_bar[[s, t]].tolist()
        eps_hat = model(xs, torch.full((len(xs),), max(s, 1), device=xs.device))
        xs = ddim_step(xs, eps_hat, alpha_bar_s, alpha_bar_t)
        if on_step is not None:
            on_step(t, xs)
    return xs


def slerp(x: Tensor, y: Tensor, frac: float) -> Tensor:
    """From x (B, C, H, W), at frac = 0, to y, at 1, along the arc between them, image by image
    [Song21 Appendix D.5].

    sin((1-f)θ)/sin θ x + sin(fθ)/sin θ y,  θ = the angle between x and y

    What lies between two draws of noise then has the length of noise; on the straight line it
    would be too short. Where the angle is 0 (or π, and no arc is the shortest) it is that line.
    """
    cosine = torch.cosine_similarity(x.flatten(1), y.flatten(1))
    theta = cosine.clamp(-1, 1).acos().view(-1, 1, 1, 1)
    straight = theta.sin() < 1e-3
    sine = torch.where(straight, 1.0, theta.sin())
    of_x = torch.where(straight, 1 - frac, ((1 - frac) * theta).sin() / sine)
    of_y = torch.where(straight, frac, (frac * theta).sin() / sine)
    return of_x * x + of_y * y
