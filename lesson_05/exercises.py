"""Exercises of lesson 5: fill in the blanks `...`, then run

    python exercises.py      all of them
    python exercises.py 2    the second

The README has the answers, folded. Tables are indexed by t; slot 0 is the clean image, ᾱ_0 = 1.
"""

from typing import Any

from common import exercises
from lesson_05.ddpm import DDPM, linear_beta

import torch
from torch import Tensor

# 1. The β_t rise evenly from 0.0001 to 0.02, and T = 1000. At which t is an image half signal and
# half noise, ᾱ_t = 1/2? Guess first, then compute it.
HALF: Any = ...


def q_sample(alpha_bar: Tensor, x0: Tensor, t: Tensor, eps: Tensor) -> Any:
    """2. The noisy image xt of Eq. 4.

    alpha_bar (T+1,); x0 and eps (B, C, H, W); t (B,), a different time for each image.
    """
    signal_rate: Any = ...
    noise_rate: Any = ...
    return signal_rate * x0 + noise_rate * eps


def training_loss(process: DDPM, model: Any, x0: Tensor) -> Any:
    """3. Lines 3 to 5 of Algorithm 1: draw a time and noise for each image of x0 (B, C, H, W), and
    return the loss of each image, (B,)."""
    t: Any = ...
    eps: Any = ...
    t, eps = t.to(x0.device), eps.to(x0.device)
    out = model(process.q_sample(x0, t, eps), t)
    target: Any = ...
    return ((target - out) ** 2).flatten(1).mean(1)


def p_sample(beta: Tensor, alpha_bar: Tensor, model: Any, xt: Tensor, t: int, z: Tensor) -> Any:
    """4. One reverse step with σ_t² = β_t, from xt (B, C, H, W) to x_{t-1}: Eq. 11, Algorithm 2.

    beta, alpha_bar (T+1,); z (B, C, H, W) is noise of variance 1. Nothing is clipped.
    """
    eps_hat = model(xt, torch.full((len(xt),), t))
    scale: Any = ...
    weight: Any = ...
    mean = scale * (xt - weight * eps_hat)
    deviation: Any = ...  # the noise's standard deviation; it must be right at every t
    return mean + deviation * z


def weight_of_x0(alpha_bar: Tensor) -> Any:
    """5. A network predicts x0 instead of the noise. Which factor turns its squared error into
    L_simple? alpha_bar is ᾱ_t, at any t."""
    return ...


def score(alpha_bar: Tensor, eps_hat: Tensor) -> Any:
    """6. The score ∇ log q(xt), from the predicted noise eps_hat in xt. alpha_bar is ᾱ_t."""
    return ...


def check_1_half() -> None:
    alpha_bar = DDPM(linear_beta(1000)).alpha_bar
    assert HALF is not ..., "fill in the ..."
    assert HALF in (259, 260), f"there ᾱ_t is {alpha_bar[int(HALF)]:.3f}"


def check_2_q_sample() -> None:
    process = DDPM(linear_beta(1000))
    x0, eps, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([1, 400, 1000])
    xt = q_sample(process.alpha_bar.float(), x0, t, eps)
    assert xt.shape == x0.shape, f"its shape is {tuple(xt.shape)}, not that of x0"
    wrong = (xt - process.q_sample(x0, t, eps)).abs().amax((1, 2, 3))
    assert (wrong < 1e-5).all(), f"at t = 1, 400 and 1000 it is off by up to {wrong.tolist()}"


def check_3_training_loss() -> None:
    process, x0, asked = DDPM(linear_beta(25)), torch.zeros(4000, 1, 2, 2), []

    def model(xt: Tensor, t: Tensor) -> Tensor:
        asked.append((xt, t))
        return torch.full_like(xt, 0.5)

    losses = training_loss(process, model, x0)
    ((xt, t),) = asked
    assert t.shape == (4000,), f"t has the shape {tuple(t.shape)}: each image needs a time"
    assert t.min() >= 1, "t = 0 is the clean image: there is nothing to predict"
    counts = torch.bincount(t)[1:].tolist()
    assert len(counts) == 25, f"the largest time drawn is {t.max()}, T is 25"
    assert min(counts) > 100, f"the times are not equally likely: drawn {counts} times"
    eps = xt / process.noise_rate[t]  # x0 is 0
    assert abs(eps.mean()) < 0.05, f"the noise has mean {eps.mean():.2f}"
    assert abs(eps.std() - 1) < 0.05, f"the noise has standard deviation {eps.std():.2f}"
    assert losses.shape == (4000,), f"the losses have the shape {tuple(losses.shape)}, not (4000,)"
    right = ((eps - 0.5) ** 2).flatten(1).mean(1)
    assert torch.allclose(losses, right, atol=1e-4), "it is not the mean squared error of the noise"


def check_4_p_sample() -> None:
    process, beta = DDPM(linear_beta(1000), "beta"), torch.cat([torch.zeros(1), linear_beta(1000)])
    xt, z = torch.randn(2, 2, 1, 3, 3)
    for t in (700, 2, 1):
        t_batch = torch.full((2,), t)
        p = process.p_mean_variance(torch.tanh(xt), xt, t_batch, clip_x0=False)
        right = p.mean if t == 1 else p.mean + torch.exp(0.5 * p.log_var) * z
        x = p_sample(beta.float(), process.alpha_bar.float(), lambda xt, t: xt.tanh(), xt, t, z)
        hint = ": the result is the image, is there noise in it?" if t == 1 else ""
        assert torch.allclose(x, right, atol=1e-4), f"the step from t = {t} is wrong{hint}"


def check_5_weight_of_x0() -> None:
    process = DDPM(linear_beta(1000))
    x0, eps, eps_hat = torch.randn(3, 1, 1, 4, 4)
    for t in (torch.tensor([1]), torch.tensor([300]), torch.tensor([900])):
        x0_hat = process.predict_x0(process.q_sample(x0, t, eps), t, eps_hat)
        weight = weight_of_x0(process.alpha_bar[t])
        assert weight is not ..., "fill in the ..."
        ratio = (weight * ((x0_hat - x0) ** 2).mean() / ((eps_hat - eps) ** 2).mean()).item()
        assert abs(ratio - 1) < 1e-2, f"at t = {t.item()} the loss is {ratio:.3g} times L_simple"


def check_6_score() -> None:
    alpha_bar, var = torch.tensor(0.3), 4.0  # x0 ~ N(0, 4), so xt ~ N(0, 0.3 · 4 + 0.7)
    xt = torch.randn(5, requires_grad=True)
    log_density = torch.distributions.Normal(0.0, (alpha_bar * var + 1 - alpha_bar).sqrt())
    (right,) = torch.autograd.grad(log_density.log_prob(xt).sum(), xt)
    x0_mean = alpha_bar.sqrt() * var / (alpha_bar * var + 1 - alpha_bar) * xt.detach()
    eps_mean = (xt.detach() - alpha_bar.sqrt() * x0_mean) / (1 - alpha_bar).sqrt()
    found = score(alpha_bar, eps_mean)
    assert found is not ..., "fill in the ..."
    wrong = f"where the score is {right[0]:.2f}, yours is {found[0]:.2f}"
    assert torch.allclose(found, right, atol=1e-5), wrong


if __name__ == "__main__":
    exercises.run(globals())
