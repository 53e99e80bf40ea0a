# ruff: noqa: F841, RUF059 (names that are waiting for the blanks)
"""Six exercises: fill in each `...`, then run this file from its folder.

    python exercises.py        # all of them
    python exercises.py 3      # the third

The answers are folded in the README's section Exercises.
"""

import math
from typing import Any

from common import exercises
from lesson_02.dpm import DPM, erasing_beta

import torch
from torch import Tensor

# 1. The straight line. Guess first, then compute: what is the last t at which an image of the
# 1000-step process is more signal than noise, ᾱ_t > 1 - ᾱ_t?
LAST_T: Any = ...
# And at which t has a process of 10 steps lost half of the data's variance? Give the t whose ᾱ_t
# is closest to ½.
HALF_OF_TEN: Any = ...


def check_1_straight_line() -> None:
    bar = (1 - erasing_beta(1000)).cumprod(0)
    assert LAST_T in range(1001), "a t from 1 to 1000"
    assert bar[LAST_T - 1] > 0.5 >= bar[LAST_T], "ᾱ_t is close to 1 - t/T, but not equal to it"
    right = 1 + ((1 - erasing_beta(10)).cumprod(0) - 0.5).abs().argmin()
    assert right.item() == HALF_OF_TEN, "print (1 - erasing_beta(10)).cumprod(0)"


# 2. One step back [Eq. 64, 65, in the form of the authors' code]


def reverse_gaussian(out: Tensor, xt: Tensor, beta_t: float, T: int) -> Any:
    """The mean and the natural log of the variance of p(x_{t-1} | xt), each of xt's shape.

    Args:
        out: the network's output (B, 2C, H, W): μ, then b.
        xt: the noisy image (B, C, H, W).
        beta_t: the variance of the forward step to xt.
        T: number of steps.
    """
    mu, b = out.chunk(2, dim=1)
    mean: Any = ...
    log_var: Any = ...
    return mean, log_var


def check_2_reverse_gaussian() -> None:
    torch.manual_seed(0)
    for T, t in [(10, 2), (100, 70), (1000, 1000), (1000, 2)]:
        beta = erasing_beta(T)
        xt, out = torch.randn(3, 2, 4, 4), 3 * torch.randn(3, 4, 4, 4)
        right = DPM(beta).p_mean_variance(out, xt, torch.full((3,), t))
        mean, log_var = reverse_gaussian(out, xt, beta[t - 1].item(), T)
        assert torch.allclose(mean, right.mean, atol=1e-5), f"the mean is wrong at {t=}, {T=}"
        assert log_var.shape == xt.shape, "a variance for each pixel"
        assert torch.allclose(log_var, right.log_var, atol=1e-4), f"wrong variance at {t=}, {T=}"


# 3. What the bound contains besides the network [Eq. 14]


def constants(beta: Tensor) -> Any:
    """H_q(XT | X0), H_q(X1 | X0) and H_p(XT), in bits a value.

    Args:
        beta: β_1 ... β_T, (T,), float64.
    """
    alpha_bar = (1 - beta).cumprod(0)
    last: Any = ...
    first: Any = ...
    prior: Any = ...
    return last, first, prior


# By how many bits does the ceiling of K rise whenever β_1 is halved (and T stays at 1000)?
GAIN: Any = ...
# A network that outputs 0 has K = L_null exactly. For which data? "a": only for standard normal
# data; "b": for all data of mean 0 and variance 1; "c": for none.
ZERO_NETWORK: Any = ...


def check_3_constants() -> None:
    for T in (2, 50, 1000):
        beta = erasing_beta(T)
        last, first, prior = (float(x) for x in constants(beta))
        entropy = 0.5 * math.log2(2 * math.pi * math.e)
        assert math.isclose(prior, entropy, abs_tol=1e-6), "π is N(0, 1)"
        assert math.isclose(first, entropy + 0.5 * math.log2(beta[0]), abs_tol=1e-5), "X1 given X0"
        ceiling = last - first - prior + entropy
        assert math.isclose(ceiling, DPM(beta).ceiling().item(), abs_tol=1e-4), "XT given X0"
    assert abs(GAIN - 0.5) < 0.01, "compare DPM(beta).ceiling() for two β_1"
    assert ZERO_NETWORK == "b", "try bits_per_dim on pixels that are -1 or 1 with equal probability"


# 4. Sampling [Section 2.2]


def sample(process: DPM, model: Any, x_T: Tensor) -> Any:
    """x_1 from the noise x_T; process.p_mean_variance gives the mean and log variance of a step."""
    times: Any = ...  # the t of the steps back, in order
    xt: Any = x_T
    for t in times:
        t_batch = torch.full((len(xt),), t)
        mean, log_var = process.p_mean_variance(model(xt, t_batch), xt, t_batch)
        z = torch.randn_like(xt)
        xt = ...
    return xt


def check_4_sampling() -> None:
    process, asked = DPM(erasing_beta(20)), []

    def model(xt: Tensor, t: Tensor) -> Tensor:
        asked.append(t[0].item())
        return torch.cat([xt.tanh(), torch.full_like(xt, -3.0)], 1)

    x_T = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    found = sample(process, model, x_T)
    assert asked, "the network was never called"
    assert asked == list(range(20, 1, -1)), f"the network was asked at t = {asked}"
    torch.manual_seed(1)
    right = process.sample(model, x_T)
    assert torch.allclose(found, right, atol=1e-5), "mean + deviation * z, in every step"


# 5. Evidence that counts once. The paper also offers r(x_t) = r(x_0)^((T-t)/T), which starts with
# no evidence at t = T and ends with all of it at t = 0 [Section 2.5].


def noise_var_at(noise_var: float, t: int, T: int) -> Any:
    """The variance of the Gaussian r(x_t), if that of r(x_0) is noise_var. t from 0 to T-1."""
    return ...


# Data N(0, 1), y = 1, noise_var = 1, T = 1000: what mean and variance does the perturbed process
# reach with this r? `perturbed` below computes them from your function. Give two decimals.
MEAN: Any = ...
VARIANCE: Any = ...
# With a constant variance of r instead, by which factor must noise_var be multiplied for the
# perturbed process to reach the true posterior, 0.5 and 0.5?
FACTOR: Any = ...


def perturbed(noise_vars: list[float], y: float = 1.0) -> tuple[float, float]:
    """Mean and variance of x_1 for unit data; noise_vars[t] is the variance of r at x_t."""
    beta, mean, var = erasing_beta(1000).tolist(), 0.0, 1.0
    for t in range(1000, 1, -1):
        weight = beta[t - 1] / (beta[t - 1] + noise_vars[t - 1])
        keep = (1 - weight) * math.sqrt(1 - beta[t - 1])
        mean, var = keep * mean + weight * y, keep**2 * var + (1 - weight) * beta[t - 1]
    return mean, var


def check_5_evidence() -> None:
    for s2, t, T in [(0.3, 0, 10), (2.0, 9, 10), (1.0, 500, 1000)]:
        assert abs(noise_var_at(s2, t, T) - s2 * T / (T - t)) < 1e-6, f"wrong at {t=}, {T=}"
    mean, var = perturbed([noise_var_at(1.0, t, 1000) for t in range(1000)])
    assert abs(MEAN - mean) < 0.01, "print perturbed([noise_var_at(1.0, t, 1000) for t ...])"
    assert abs(VARIANCE - var) < 0.01, "the second number of perturbed"
    mean, var = perturbed([float(FACTOR)] * 1000)
    assert max(abs(mean - 0.5), abs(var - 0.5)) < 0.01, f"{FACTOR} gives {mean:.2f}, {var:.2f}"


# 6. Does dequantisation matter here? MNIST's deviation is 78.57 grey levels.


def first_noise(beta_1: float, std: float = 78.57) -> Any:
    """The deviation of the first step's noise, √β_1 in units of the data, in grey levels."""
    return ...


def cost(beta_1: float, std: float = 78.57) -> Any:
    """Bits by which uniform noise of one level's width raises the entropy of x_1, for a pixel that
    is always black. Take x_1 as a Gaussian, with and without that noise."""
    return ...


# --dequantize false at T = 1000 (β_1 = 0.002) changes K - L_null of the shipped network by
# "a": more than 1 bit; "b": between 0.1 and 1 bit; "c": less than 0.01 bits.
CHANGE: Any = ...


def check_6_dequantisation() -> None:
    for beta_1 in (0.002, 1e-4, 1e-6):
        right = 78.57 * math.sqrt(beta_1)
        assert math.isclose(first_noise(beta_1), right, rel_tol=1e-4), "deviations scale like data"
        bits = 0.5 * math.log2(1 + 1 / (12 * right**2))
        assert math.isclose(cost(beta_1), bits, rel_tol=1e-3), "U(-½, ½) has the variance 1/12"
    assert CHANGE == "c", "compare with cost(0.002), the change for a pixel that is always black"


if __name__ == "__main__":
    exercises.run(globals())
