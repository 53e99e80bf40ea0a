"""Denoising Diffusion Implicit Models, Song, Meng & Ermon 2021 (arXiv 2010.02502), "Song21".

A network trained as in lesson 5 is sampled in S of the T steps, and η sets how much noise each step
adds. Nothing is trained here: these are functions of lesson 5's process and of a network that
predicts the noise, eps_hat = model(xt, t).

The paper's α_t is lesson 5's ᾱ_t and is called alpha_bar here. The network is evaluated at the
times τ_1 < ... < τ_S; s < t are two neighbours among 0, τ_1, ..., τ_S.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, get_args

from common.errors import UserError
from common.sampling import last_images
from lesson_05.ddpm import DDPM, Network

import torch
from torch import Tensor

Spacing = Literal["uniform", "quadratic", "trailing"]
MIN_SIGNAL = 0.002  # √ᾱ of the first time below which x̂0 is clipped unless the caller decides


def ddim_timesteps(T: int, S: int, spacing: Spacing = "uniform") -> list[int]:
    """The times τ_1 < ... < τ_S of the network's evaluations [Song21 Section 4.2, Appendix D.2].

    uniform: τ_i = 1 + (i-1) ⌊T/S⌋.  quadratic: τ_i = 1 + ⌊0.8 T ((i-1)/(S-1))²⌋, dense near the
    image.  trailing: τ_i = i T/S, rounded, so that the first step starts at T.

    S distinct integers in 1..T, ascending; for S = 1, T alone.
    Differs: where S does not divide T, the authors' loop over the stride takes more than S steps;
    here it stops after S. Equal times of the quadratic rule are moved up until they differ; the
    authors' 50 of 1000 contain the first time twice. Trailing is not in the paper.
    """
    if not 1 <= S <= T:
        raise UserError(
            f"num_steps is {S}: choose 1 to {T}, the steps that the network was trained on"
        )
    if spacing not in get_args(Spacing):
        raise UserError(f"spacing {spacing!r} is not known: choose {', '.join(get_args(Spacing))}")
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

    η = 0 is DDIM. η = 1 is DDPM's √β̃ for the step from t to s. σ is 0 for s = 0.
    """
    check_eta(eta)
    if eta == 0:
        return 0.0
    return eta * math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))


def check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}: choose 0 (no noise) to 1 (the noise of DDPM)")


def ddim_step(
    xt: Tensor,
    eps_hat: Tensor,
    alpha_bar_t: float,
    alpha_bar_s: float,
    eta: float = 0.0,
    sigma_hat: bool = False,
) -> Tensor:
    """One step from xt to xs: the estimated image, noised again to the level of s [Song21 Eq. 12].

    xs = √ᾱ_s x̂0 + √(1-ᾱ_s-σ²) ε̂ + σ z,  x̂0 = (xt - √(1-ᾱ_t) ε̂)/√ᾱ_t [Eq. 9],  z ~ N(0, 1)

    The noise in xs has the variance 1 - ᾱ_s, as in training [Song21 Eq. 7, Lemma 1]: σ² of it is
    new, the rest is the estimated noise of xt. ᾱ_s = 1 gives the image x̂0.
    With η = 0 a step can also go to a noisier s [Song21 Eq. 13].

    sigma_hat, with η = 1: z is multiplied by the larger σ̂ = √(1 - ᾱ_t/ᾱ_s), DDPM's √β, but σ stays
    in the root, as in the authors' code; the last step adds no noise [Song21 Section 5].
    Differs: for σ̂ the authors' code (`ddpm_steps`) also clips x̂0 to [-1, 1].
    """
    sigma = ddim_sigma(alpha_bar_t, alpha_bar_s, eta)
    if sigma_hat and eta != 1:
        raise UserError(f"sigma_hat needs eta 1, not {eta}")
    x0_hat = (xt - math.sqrt(1 - alpha_bar_t) * eps_hat) / math.sqrt(alpha_bar_t)
    eps_coef = math.sqrt(max(1 - alpha_bar_s - sigma**2, 0.0))
    mean = math.sqrt(alpha_bar_s) * x0_hat + eps_coef * eps_hat
    if sigma == 0:
        return mean
    scale = math.sqrt(1 - alpha_bar_t / alpha_bar_s) if sigma_hat else sigma
    return mean + scale * torch.randn_like(xt)


def predict_noise(model: Network, process: DDPM, xt: Tensor, t: int) -> Tensor:
    """ε̂ = model(xt, t) (B, C, H, W), without the channels in which lesson 9's networks predict a
    variance. At step t of a strided process of lesson 9 the network gets the time τ_t instead. Of a
    network that predicts x0 or the mean, ε̂ is the noise that goes with its x̂0 [Song21 Eq. 9]."""
    timesteps = getattr(process, "timesteps", None)
    network_t = t if timesteps is None else int(timesteps[t])
    t_batch = torch.full((len(xt),), network_t, device=xt.device)
    out = model(xt, t_batch)[:, : xt.shape[1]]
    if getattr(process, "prediction", "eps") == "eps":
        return out
    x0_hat = process.predict_x0(xt, t_batch, out)
    return (xt - process.signal_rate[t] * x0_hat) / process.noise_rate[t]


def clip_eps(xt: Tensor, eps_hat: Tensor, alpha_bar_t: float) -> Tensor:
    """The noise that goes with x̂0 clipped to [-1, 1]: Eq. 9 solved for ε̂ [Song21 Eq. 9].

    Differs: the paper does not clip.
    """
    signal_rate, noise_rate = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
    x0_hat = ((xt - noise_rate * eps_hat) / signal_rate).clamp(-1, 1)
    return (xt - signal_rate * x0_hat) / noise_rate


@torch.no_grad()
def ddim_trajectory(
    model: Network,
    process: DDPM,
    x_T: Tensor,
    num_steps: int = 50,
    eta: float = 0.0,
    spacing: Spacing = "uniform",
    clip_x0: bool | None = None,
    sigma_hat: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """From noise x_T (B, C, H, W) to images in num_steps steps [Song21 Section 4.2].

    Yields (s, xs) for s = τ_{S-1}, ..., τ_1, 0. With η = 0 the images are a function of x_T: no
    other random number is drawn. clip_x0: use x̂0 clipped to [-1, 1], and the ε̂ that goes with it.
    Differs: None clips if √ᾱ is below 0.002 at τ_S. At T of lesson 9's cosine schedule Eq. 9
    multiplies the error of ε̂ by 20,291, and unclipped images would be noise.
    """
    times = [0, *ddim_timesteps(process.num_timesteps, num_steps, spacing)]
    if clip_x0 is None:
        clip_x0 = math.sqrt(process.alpha_bar[times[-1]]) < MIN_SIGNAL
    xt = x_T
    for s, t in reversed(list(pairwise(times))):
        alpha_bar_t, alpha_bar_s = process.alpha_bar[[t, s]].tolist()
        eps_hat = predict_noise(model, process, xt, t)
        if clip_x0:
            eps_hat = clip_eps(xt, eps_hat, alpha_bar_t)
        xt = ddim_step(xt, eps_hat, alpha_bar_t, alpha_bar_s, eta, sigma_hat)
        yield s, xt


def ddim_sample(
    model: Network,
    process: DDPM,
    x_T: Tensor,
    num_steps: int = 50,
    eta: float = 0.0,
    spacing: Spacing = "uniform",
    clip_x0: bool | None = None,
    sigma_hat: bool = False,
) -> Tensor:
    """The images (B, C, H, W) at the end of the trajectory from x_T [Song21 Section 4.2]."""
    return last_images(
        ddim_trajectory(model, process, x_T, num_steps, eta, spacing, clip_x0, sigma_hat)
    )


@torch.no_grad()
def ddim_encode_trajectory(
    model: Network, process: DDPM, x0: Tensor, num_steps: int = 50, spacing: Spacing = "uniform"
) -> Iterator[tuple[int, Tensor]]:
    """From images x0 (B, C, H, W) to noise: the steps of η = 0 in reverse [Song21 Section 4.3].

    Yields (t, xt) for t = τ_1, ..., τ_S. Each step is an Euler step for an ODE [Song21 Eq. 14].
    From s to t it evaluates ε̂ at s, while the sampling step from t to s evaluates it at t. So
    encoding and then sampling makes an error, which falls as num_steps grows.
    Differs: the first step, from 0 to τ_1, evaluates the network at t = 1, since it was not trained
    at t = 0. The authors' code takes x0 for the image at their first time and has no such step.
    """
    times = [0, *ddim_timesteps(process.num_timesteps, num_steps, spacing)]
    xs = x0
    for s, t in pairwise(times):
        alpha_bar_s, alpha_bar_t = process.alpha_bar[[s, t]].tolist()
        eps_hat = predict_noise(model, process, xs, max(s, 1))
        xs = ddim_step(xs, eps_hat, alpha_bar_s, alpha_bar_t)
        yield t, xs


def ddim_encode(
    model: Network, process: DDPM, x0: Tensor, num_steps: int = 50, spacing: Spacing = "uniform"
) -> Tensor:
    """The noise (B, C, H, W) that ddim_sample with η = 0 maps to x0, up to the error of the steps
    [Song21 Section 4.3, 5.4]."""
    return last_images(ddim_encode_trajectory(model, process, x0, num_steps, spacing))


def slerp(x: Tensor, y: Tensor, frac: float) -> Tensor:
    """Spherical interpolation from x (B, C, H, W), at frac = 0, to y, at 1, image by image
    [Song21 Appendix D.5].

    sin((1-f)θ)/sin θ x + sin(fθ)/sin θ y,  θ = the angle between x and y

    Between two draws of noise the result has the norm of noise; on the straight line it would be
    too short. For θ = 0, and for θ = π, where no arc is the shortest, it is the straight line.
    """
    cosine = torch.cosine_similarity(x.flatten(1), y.flatten(1))
    theta = cosine.clamp(-1, 1).acos().view(-1, 1, 1, 1)
    straight = theta.sin() < 1e-3
    sine = torch.where(straight, 1.0, theta.sin())
    x_coef = torch.where(straight, 1 - frac, ((1 - frac) * theta).sin() / sine)
    y_coef = torch.where(straight, frac, (frac * theta).sin() / sine)
    return x_coef * x + y_coef * y
