"""Which t to train on next: uniformly, or more often where the bound's terms are large.

L_vlb is a sum of T terms that differ by orders of magnitude, so that an estimate from uniform t is
noisy. Nichol21 Section 3.3 draws t with probability p_t and divides by it [Nichol21 Eq. 18]:

    L_vlb = E_{t~p}[L_t / p_t],    p_t ∝ √E[L_t²]

The mean stays what it was, and its variance is the least that any p_t gives. Both samplers have the
same methods, so that the script need not know which it has; both are on the device and in the
checkpoint.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError

TimestepSampler = Literal["uniform", "loss_aware"]


class UniformTimesteps(nn.Module):
    """Every t from 1 to T alike."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T = T
        self.register_buffer("place", torch.empty(0), persistent=False)  # tells the device
        self.place: Tensor

    def sample(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """t int64 (B,) from 1 to T, and the weight of each in the loss, (B,), here 1."""
        t = torch.randint(1, self.T + 1, (batch_size,), device=self.place.device)
        return t, torch.ones_like(t, dtype=torch.float32)

    def update(self, t: Tensor, vlb: Tensor) -> None:
        """The terms of the bound (B,) that were seen at t (B,): of no use here."""

    def weights(self) -> Tensor:
        """The probability of each t, float32 (T,)."""
        return torch.full((self.T,), 1 / self.T, device=self.place.device)


class LossAwareTimesteps(nn.Module):
    """t with probability p_t ∝ √E[L_t²], the mean being over the last terms seen at t
    [Nichol21 Eq. 18].

    Until every t has `history` terms, all t are alike. A share `uniform_share` of the probability
    is spread evenly for good, so that no t is forgotten whose term was once small.

    Differs: the paper names no uniform share; 0.001 is the authors' code.
    """

    terms: Tensor  # float32 (T, history): the last terms of each t, in a ring
    seen: Tensor  # int64 (T,): how many terms each t has had

    def __init__(self, T: int, history: int = 10, uniform_share: float = 0.001) -> None:
        super().__init__()
        self.uniform_share = uniform_share
        self.register_buffer("terms", torch.zeros(T, history))
        self.register_buffer("seen", torch.zeros(T, dtype=torch.int64))

    def sample(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """t int64 (B,) from 1 to T, and the weight of each in the loss, (B,): 1 / (T p_t).

        The weights are 1 on average, so the weighted loss has the mean of the uniform one.
        """
        p = self.weights()
        index = torch.multinomial(p, batch_size, replacement=True)
        return index + 1, 1 / (len(p) * p[index])

    @torch.no_grad()
    def update(self, t: Tensor, vlb: Tensor) -> None:
        """Take up the terms of the bound (B,) that were seen at t (B,)."""
        history = self.terms.shape[1]
        index, order = (t - 1).sort(stable=True)
        places = torch.arange(len(index), device=index.device)
        earlier = places - torch.searchsorted(index, index)  # terms of the same t before it
        later = torch.searchsorted(index, index, right=True) - 1 - places
        kept = later < history  # of more than the ring holds, the last
        column = (self.seen[index] + earlier) % history
        self.terms[index[kept], column[kept]] = vlb[order[kept]].float()
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
        raise UserError(f"timestep_sampler {name!r} is not known: take uniform or loss_aware")
    return UniformTimesteps(T) if name == "uniform" else LossAwareTimesteps(T)
