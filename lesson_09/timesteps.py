"""Samplers of the training times t: uniform, or more often where the bound's terms are large.

L_vlb is a sum of T terms of very different sizes, so an estimate from uniform t is noisy.
Nichol21 Section 3.3 draws t with probability p_t and divides by it [Nichol21 Eq. 18]:

    L_vlb = E_{t~p}[L_t / p_t],    p_t ∝ √E[L_t²]

The mean stays the same, and no other p_t has a smaller variance. Both samplers have the same
methods, so the training script treats them alike.
"""

from typing import Literal

from common.errors import UserError

import torch
from torch import Tensor, nn

TimestepSampler = Literal["uniform", "loss_aware"]


class UniformTimesteps(nn.Module):
    """Every t from 1 to T with the same probability."""

    probability: Tensor  # float32 (T,)

    def __init__(self, T: int) -> None:
        super().__init__()
        self.register_buffer("probability", torch.full((T,), 1 / T), persistent=False)

    def sample(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """t int64 (B,) from 1 to T, and their weights in the loss, (B,), here 1."""
        p = self.probability
        t = torch.randint(1, len(p) + 1, (batch_size,), device=p.device)
        return t, torch.ones_like(t, dtype=p.dtype)

    def update(self, t: Tensor, vlb: Tensor) -> None:
        """Does nothing: the terms of the bound (B,) at t (B,) are ignored."""

    def weights(self) -> Tensor:
        """The probability of each t, float32 (T,)."""
        return self.probability


class LossAwareTimesteps(nn.Module):
    """Draws t with probability p_t ∝ √E[L_t²], estimated from the last terms of the bound at t
    [Nichol21 Eq. 18].

    Until every t has `history` terms, all t have the same probability. After that, a fraction
    `uniform_share` of the probability stays uniform, so that no t is neglected for long because its
    terms were once small.

    Differs: the uniform share, 0.001, is in the authors' code, not in the paper. Their code records
    the loss at t, ours the term of the bound; for L_vlb alone the two are proportional.
    """

    terms: Tensor  # float32 (T, history): the last terms of each t, as a ring buffer
    seen: Tensor  # int64 (T,): the number of terms recorded for each t

    def __init__(self, T: int, history: int = 10, uniform_share: float = 0.001) -> None:
        super().__init__()
        self.uniform_share = uniform_share
        self.register_buffer("terms", torch.zeros(T, history))
        self.register_buffer("seen", torch.zeros(T, dtype=torch.int64))

    def sample(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """t int64 (B,) from 1 to T, and their weights in the loss, (B,): 1 / (T p_t).

        The weights are 1 on average, so the weighted loss has the mean of the uniform one.
        """
        p = self.weights()
        index = torch.multinomial(p, batch_size, replacement=True)
        return index + 1, 1 / (len(p) * p[index])

    @torch.no_grad()
    def update(self, t: Tensor, vlb: Tensor) -> None:
        """Record the terms of the bound (B,) at t (B,)."""
        history = self.terms.shape[1]
        index, order = (t - 1).sort(stable=True)
        position = torch.arange(len(index), device=index.device)
        num_earlier = position - torch.searchsorted(index, index)  # terms of the same t before it
        num_later = torch.searchsorted(index, index, right=True) - 1 - position  # and after it
        stays = num_later < history  # only the last terms of each t are recorded
        column = (self.seen[index] + num_earlier) % history
        self.terms[index[stays], column[stays]] = vlb[order[stays]].float()
        self.seen.index_add_(0, index, torch.ones_like(index))

    def weights(self) -> Tensor:
        """The probability of each t, float32 (T,)."""
        T, history = self.terms.shape
        uniform = torch.full_like(self.terms[:, 0], 1 / T)
        root = (self.terms**2).mean(1).sqrt()
        aware = root / root.sum().clamp(min=torch.finfo(root.dtype).tiny)
        mixed = (1 - self.uniform_share) * aware + self.uniform_share * uniform
        ready = (self.seen >= history).all() & (root.sum() > 0)
        return torch.where(ready, mixed, uniform)


def named_sampler(name: TimestepSampler, T: int) -> UniformTimesteps | LossAwareTimesteps:
    """The sampler of that name."""
    if name not in ("uniform", "loss_aware"):
        raise UserError(f"timestep_sampler {name!r} is not known: it must be uniform or loss_aware")
    return UniformTimesteps(T) if name == "uniform" else LossAwareTimesteps(T)
