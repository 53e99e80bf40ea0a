"""Six exercises: fill in each `...`, then run this file from its folder.

    python exercises.py        # all of them
    python exercises.py 3      # the third

The answers are folded in the README's section Exercises.
"""

import math
from typing import Any

from common import exercises
from lesson_09.iddpm import ImprovedDDPM, cosine_beta, linear_beta, strided_timesteps
from lesson_09.timesteps import LossAwareTimesteps

import torch
from torch import Tensor


def shape(answer: Any) -> tuple[int, ...] | None:
    """The shape of a tensor; None for anything else."""
    assert answer is not ..., "fill in the ..."
    return tuple(answer.shape) if isinstance(answer, Tensor) else None


# 1. The cosine schedule [Nichol21 Eq. 17]


def cosine_alpha_bar(T: int, s: float = 0.008) -> Any:
    """ᾱ_0 ... ᾱ_T of the cosine schedule, float64 (T+1,), before any β is cut to 0.999.

    torch.arange(T + 1, dtype=torch.float64) is a good start.
    """
    return ...


# With your function: how many times t from 1 to 1000 have ᾱ_t > ½ at T = 1000? (Linear: 259.)
NUM_ABOVE_HALF: Any = ...
# And how many of the 1000 values β_t = 1 - ᾱ_t/ᾱ_{t-1} are above 0.999?
NUM_CUT: Any = ...


def check_1_cosine_schedule() -> None:
    for T, s in [(1000, 0.008), (4000, 0.008), (50, 0.0), (10, 0.2)]:
        found = cosine_alpha_bar(T, s)
        assert shape(found) == (T + 1,), "a tensor of T+1 numbers"
        assert abs(found[0].item() - 1) < 1e-9, "ᾱ_0 is 1: the clean image has lost nothing"
        right = torch.cat([torch.ones(1).double(), (1 - cosine_beta(T, s)).cumprod(0)])
        assert torch.allclose(found[:T].double(), right[:T], atol=1e-6), f"wrong for T = {T}, {s=}"
        assert abs(found[T].item()) < 1e-6, "ᾱ_T is 0 before the last β is cut"
    assert ... not in (NUM_ABOVE_HALF, NUM_CUT), "the function is right; fill in the two numbers"
    assert NUM_ABOVE_HALF == 496, "count (cosine_alpha_bar(1000)[1:] > 0.5)"
    assert NUM_CUT == 1, "compare 1 - ᾱ_t/ᾱ_{t-1} with 0.999 at each t"


# 2. What the variance should be


def best_variance(alpha_bar: Tensor, t: int, s: float) -> Any:
    """Var(x_{t-1} | xt) for data N(m, s²): β̃_t + w_t² e_t. β_t is 1 - ᾱ_t/ᾱ_{t-1}.

    Args:
        alpha_bar: ᾱ_0 ... ᾱ_T, (T+1,).
        t: from 2 to T.
        s: standard deviation of the data.
    """
    beta_tilde: Any = ...
    w: Any = ...
    e: Any = ...
    return beta_tilde + w**2 * e


def check_2_best_variance() -> None:
    for beta in (linear_beta(1000), cosine_beta(1000)):
        bar = ImprovedDDPM(beta).alpha_bar
        for t in (2, 3, 50, 500, 999):
            prev, now = bar[t - 1].item(), bar[t].item()
            b = 1 - now / prev
            for s, end in [(0.0, (1 - prev) / (1 - now) * b), (1.0, b)]:
                near = math.isclose(float(best_variance(bar, t, s)), end, rel_tol=1e-6)
                assert near, f"s = {s} must give {'β' if s else 'β̃'}: wrong at t = {t}"
            for s in (0.3, 0.5, 3.0):
                # The precision of x_{t-1} is that of N(., ᾱs² + 1-ᾱ) plus that of the step.
                right = 1 / (1 / (prev * s**2 + 1 - prev) + now / prev / b)
                near = math.isclose(float(best_variance(bar, t, s)), right, rel_tol=1e-6)
                assert near, f"wrong for s = {s} at t = {t}"


# 3. The learned variance [Nichol21 Eq. 15]


def learned_log_var(v: Tensor, log_beta: Tensor, log_beta_tilde: Tensor) -> Any:
    """log σ_t². v (B, C, H, W) is the network's second output: -1 stands for β̃_t, 1 for β_t.

    log_beta and log_beta_tilde are (B, 1, 1, 1).
    """
    return ...


def check_3_learned_variance() -> None:
    torch.manual_seed(0)
    process = ImprovedDDPM(cosine_beta(100))
    t = torch.tensor([1, 2, 3, 50, 100])
    v, xt = 3 * torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3)
    ends = process.log_beta[t], process.posterior_log_var[t]
    for name, value, end in [("-1", -1.0, ends[1]), ("1", 1.0, ends[0])]:
        found = learned_log_var(torch.full_like(v, value), *ends)
        assert torch.allclose(found, end.expand_as(v), atol=1e-5), f"wrong end at v = {name}"
    right = process.p_mean_variance(torch.cat([xt, v], 1), xt, t).log_var
    assert torch.allclose(learned_log_var(v, *ends), right, atol=1e-4), (
        "the ends are right, the values between or outside are not: interpolate log σ², unclipped"
    )


# 4. The hybrid loss [Nichol21 Eq. 16]


def hybrid_loss(
    process: ImprovedDDPM, out: Tensor, x0: Tensor, xt: Tensor, t: Tensor, eps: Tensor
) -> Any:
    """L_simple + λ L_vlb for each image, (B,), where out (B, 2C, H, W) is ε̂ and v.

    process.p_mean_variance(out, xt, t, clip_x0=False) is the reverse step, and
    process.term_bits(p, x0, xt, t) the one term of the bound that belongs to t. λ is
    process.vlb_weight, T is process.num_timesteps. Begin with eps_hat, v = out.chunk(2, dim=1).
    """
    return ...


def check_4_hybrid_loss() -> None:
    torch.manual_seed(0)
    process = ImprovedDDPM(cosine_beta(100))
    x0, eps = torch.rand(4, 1, 3, 3).mul(255).round() / 127.5 - 1, torch.randn(4, 1, 3, 3)
    t = torch.tensor([1, 2, 30, 100])
    out = torch.randn(4, 2, 3, 3, requires_grad=True)
    found = hybrid_loss(process, out, x0, process.q_sample(x0, t, eps), t, eps)
    right = process.loss(lambda xt, t: out, x0, t, eps)
    assert shape(found) == (4,), "one loss for each of the 4 images"
    assert torch.allclose(found, right, rtol=1e-4), (
        "the value is wrong: a mean of squares, plus λ times an estimate of the sum over all T"
    )
    (mine,) = torch.autograd.grad(found.sum(), out, retain_graph=True)
    (theirs,) = torch.autograd.grad(right.sum(), out)
    assert torch.allclose(mine[:, 1:], theirs[:, 1:], rtol=1e-3), "L_vlb must train v"
    assert torch.allclose(mine[:, :1], theirs[:, :1], rtol=1e-3), (
        "the value is right, the gradient of ε̂ is not: hold the mean of L_vlb fixed"
    )


# 5. Importance sampling [Nichol21 Eq. 18]


def best_probabilities(terms: Tensor) -> Any:
    """p_1 ... p_T from the last K terms of the bound at each t: terms (T, K) -> (T,)."""
    return ...


def loss_weight(p: Tensor, t: Tensor) -> Any:
    """The factor of the loss of an image with time t, from 1 to T: p (T,), t (B,) -> (B,).

    Its average over t drawn from p is 1.
    """
    return ...


# Let the term at t be exactly 1/t, T = 1000. How many times smaller is E[(L_t/p_t)²] with the best
# p than with uniform p? Two digits are enough.
FACTOR: Any = ...


def check_5_importance_sampling() -> None:
    torch.manual_seed(0)
    T = 20
    terms = torch.rand(T, 10) ** 3 / torch.arange(1, T + 1).view(-1, 1)
    p = best_probabilities(terms)
    assert shape(p) == (T,), "one probability for each t"
    assert abs(p.sum().item() - 1) < 1e-5, "probabilities add up to 1"
    sampler = LossAwareTimesteps(T, uniform_share=0.0)
    for column in terms.T:
        sampler.update(torch.arange(1, T + 1), column)
    assert torch.allclose(p, sampler.weights(), atol=1e-5), "the root of the mean square of each t"
    weight = loss_weight(p, torch.arange(1, T + 1))
    assert torch.allclose(weight, 1 / (T * p), rtol=1e-4), "rare times must count more; mean 1"
    assert math.isclose(FACTOR, 29.34, rel_tol=0.02), "(Σ L)² is the best, T Σ L² the uniform one"


# 6. Fewer steps [Nichol21 Eq. 19]


def strided_betas(alpha_bar: Tensor, times: Tensor) -> Any:
    """β_1 ... β_S of the process that takes only the times τ_1 < ... < τ_S.

    alpha_bar (T+1,) is ᾱ_0 ... ᾱ_T of the long process, times (S,) int64. After its
    step i the short process must have the ᾱ of the long one at τ_i.
    """
    return ...


def check_6_strided_betas() -> None:
    for beta in (linear_beta(1000), cosine_beta(1000)):
        process = ImprovedDDPM(beta)
        for S in (1, 2, 10, 300, 1000):
            times = strided_timesteps(1000, S)
            found = strided_betas(process.alpha_bar, times)
            assert shape(found) == (S,), "one β for each step"
            kept = (1 - found).cumprod(0)
            assert torch.allclose(kept, process.alpha_bar[times], rtol=1e-5, atol=1e-12), (
                f"S = {S}: the product of 1 - β must be ᾱ at the chosen times"
            )


if __name__ == "__main__":
    exercises.run(globals())
