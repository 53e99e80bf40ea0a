"""Exercises of lesson 6. Replace each ... and run `python exercises.py`, or `python exercises.py 4`
for the fourth alone. The README asks the same questions and has the answers."""

import math
from itertools import pairwise
from typing import Any

from common import exercises
from lesson_05.ddpm import DDPM, Network, linear_beta
from lesson_06 import ddim

import torch
from torch import Tensor

# 1. A sampler visits the times range(1, T + 1, T // S). How often does it evaluate the network for
#    T = 1000 and S = 300? And which spacing of ddim_timesteps starts sampling at t = T for every S:
#    "uniform", "quadratic" or "trailing"?

evaluations: Any = ...
starts_at_T: Any = ...


def check_1_times() -> None:
    assert isinstance(evaluations, int), "evaluations is a number"
    assert evaluations == len(range(1, 1001, 1000 // 300)), (
        "what is 1000 // 300? Count the values of the range"
    )
    last = {name: ddim.ddim_timesteps(1000, 5, name)[-1] for name in ("uniform", "quadratic")}
    assert starts_at_T == "trailing", f"for S = 5 the last times are {last}"


# 2. x and y are independent noises with N(0, 1) in each of very many pixels. What is the standard
#    deviation of a pixel of (x + y)/2? And of slerp(x, y, 0.5)?

deviation_on_the_line: Any = ...
deviation_on_the_arc: Any = ...


def check_2_halfway() -> None:
    line, arc = float(deviation_on_the_line), float(deviation_on_the_arc)
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 1, 300, 300)
    assert abs(line - ((x + y) / 2).std().item()) < 0.02, "variances add, and (1/2)² = 1/4"
    assert abs(arc - ddim.slerp(x, y, 0.5).std().item()) < 0.02, "what does slerp keep?"


# 3. The uniform times: the first S of 1, 1 + c, 1 + 2c, ... with the stride c = T // S. There must
#    be exactly S of them, ascending, for every S from 2 to T.


def uniform_times(T: int, S: int) -> Any:
    """τ_1 < ... < τ_S, a list of S integers in 1..T."""
    return ...


def check_3_uniform_times() -> None:
    for T, S in [(1000, 50), (1000, 300), (1000, 999), (60, 7), (10, 10), (1000, 2)]:
        times = list(uniform_times(T, S))
        assert len(times) == S, f"{len(times)} times for T = {T}, S = {S}"
        assert 0 not in times, "the network was not trained at t = 0"
        assert times == ddim.ddim_timesteps(T, S), f"for T = {T}, S = {S} got {times[:3]}..."


# 4. One step from xt to xs (Eq. 12), with the new noise z given. Which standard deviation does η
#    give the new noise (Eq. 16)? Which factor is left for the predicted noise?


def ddim_step(
    xt: Tensor, eps_hat: Tensor, alpha_bar_t: float, alpha_bar_s: float, eta: float, z: Tensor
) -> Any:
    """xs (B, C, H, W)."""
    x0_hat: Any = ...
    sigma: Any = ...
    eps_coef: Any = ...
    return math.sqrt(alpha_bar_s) * x0_hat + eps_coef * eps_hat + sigma * z


def check_4_ddim_step() -> None:
    process = DDPM(linear_beta(1000), "beta_tilde")
    for t, s in [(1000, 980), (500, 300), (21, 1), (1, 0), (500, 499)]:
        xt, eps_hat = torch.randn(2, 2, 1, 4, 4)
        bar_t, bar_s = process.alpha_bar[[t, s]].tolist()
        for eta in (0.0, 0.4, 1.0):
            torch.manual_seed(t)
            z = torch.randn_like(xt)
            torch.manual_seed(t)
            expected = ddim.ddim_step(xt, eps_hat, bar_t, bar_s, eta)
            got = ddim_step(xt, eps_hat, bar_t, bar_s, eta, z)
            where = f"from t = {t} to s = {s} with eta = {eta}"
            assert close(got, expected), f"another xs {where}"
        if s == t - 1 > 0:  # with eta = 1 this is lesson 5's sampler
            torch.manual_seed(t)
            ddpm = process.p_sample(lambda *_, eps=eps_hat: eps, xt, t, clip_x0=False)
            assert close(got, ddpm), "with eta = 1 it is not lesson 5's step"


# 5. One step of encoding, from xs up to xt, s < t, with η = 0. At which time does Euler's method
#    evaluate the network on the way up? And if s = 0, where the network was not trained?


def encode_step(model: Network, process: DDPM, xs: Tensor, s: int, t: int) -> Any:
    """xt (B, C, H, W)."""
    alpha_bar = process.alpha_bar.tolist()
    time: Any = ...
    eps_hat = model(xs, torch.full((len(xs),), time))
    x0_hat: Any = ...
    return math.sqrt(alpha_bar[t]) * x0_hat + math.sqrt(1 - alpha_bar[t]) * eps_hat


def check_5_encode_step() -> None:
    process = DDPM(linear_beta(1000))

    def model(xt: Tensor, t: Tensor) -> Tensor:
        assert t.min() >= 1, "the network was not trained at t = 0"
        return (t / 1000).view(-1, 1, 1, 1) * xt.cos()

    x0 = torch.randn(2, 1, 4, 4)
    xs = x0
    for s, t in pairwise([0, *ddim.ddim_timesteps(1000, 10)]):
        xs = encode_step(model, process, xs, s, t)
    assert close(xs, ddim.ddim_encode(model, process, x0, 10)), "encodes into other noise"


# 6. The data are N(0, 1), and the best network is eps_hat = √(1-ᾱ_t) xt. Add a small error δ to xt.
#    What share of δ is left in the image after short steps, for η = 0 and for η = 1? (Put eps_hat
#    into Eq. 12 and find the factor of xt.)


def share_left(alpha_bar_t: float, eta: int) -> Any:
    """The error of the image divided by that of xt; eta is 0 or 1."""
    return ...


def check_6_share_left() -> None:
    alpha_bar = DDPM(linear_beta(1000)).alpha_bar.tolist()
    for eta in (0, 1):
        factor = 1.0  # of xt in the image: the product of the factors of all steps from t to 0
        for t in range(1, 1001):
            bar_t, bar_s = alpha_bar[t], alpha_bar[t - 1]
            left = max(1 - bar_s - ddim.ddim_sigma(bar_t, bar_s, eta) ** 2, 0.0)
            factor *= math.sqrt(bar_s * bar_t) + math.sqrt(left * (1 - bar_t))
            if t in (10, 100, 500, 1000):
                right = abs(share_left(bar_t, eta) - factor) < 0.01
                assert right, f"not the share for eta = {eta}, t = {t}"


def close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, atol=1e-4, rtol=1e-3)


if __name__ == "__main__":
    exercises.run(globals())
