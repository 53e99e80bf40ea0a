"""Classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598), "HoSalimans22".

During training the condition is sometimes replaced by a learned null condition. During sampling the
estimate of the noise can then be moved away from the unconditional one.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from common.errors import UserError, check_at_least

import torch
from torch import Tensor

V = TypeVar("V")


class Guided:
    """The noise estimate, moved away from the unconditional one [HoSalimans22 Eq. 6].

    ε̂ = ε̂(xt, t, ∅) + s (ε̂(xt, t, c) - ε̂(xt, t, ∅))

    s = 1 is the conditional estimate, s = 0 the unconditional one; each takes one evaluation of the
    network. Any other s needs both estimates, computed in one batch of twice the size. A process
    calls it like any network.
    Differs: the paper writes w = s - 1.

    Args:
        model: called as model(xt, t, condition).
        scale: s, at least 0.
        condition: c for each image of the batch: a tensor, or a tuple of tensors.
        null: ∅ for each image, of the same shapes.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor, Any], Tensor],
        scale: float,
        condition: Any,
        null: Any,
    ) -> None:
        check_at_least(0, guidance=scale)
        self.model, self.scale = model, scale
        if scale in (0, 1):
            self.condition = condition if scale == 1 else null
        else:
            self.condition = join(condition, null)

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        if self.scale in (0, 1):
            return self.model(xt, t, self.condition)
        both = self.model(torch.cat([xt, xt]), torch.cat([t, t]), self.condition)
        eps_cond, eps_null = both.chunk(2)
        return eps_null + self.scale * (eps_cond - eps_null)


def join(first: Any, second: Any) -> Any:
    """Two batches of conditions as one."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    return type(first)(*map(join, first, second))


def drop(condition: Tensor, null: Tensor, probability: float) -> Tensor:
    """Replace each image's condition by the null condition with this probability
    [HoSalimans22 Algorithm 1].

    condition, null (B, ...).
    """
    if not 0 <= probability <= 1:
        raise UserError(f"drop_probability is {probability}: it must be from 0 to 1")
    dropped = torch.rand(len(condition), device=condition.device) < probability
    return torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), null, condition)


def one_per_sample(values: Sequence[V], num_samples: int, name: str) -> list[V]:
    """One value for each sample. If there are too few values, they are repeated in order."""
    if not 1 <= len(values) <= num_samples:
        raise UserError(
            f"{len(values)} {name} for {num_samples} samples: give 1 to {num_samples} of them "
            f"(fewer are repeated in order), or --num_samples {max(len(values), 1)}"
        )
    return [values[i % len(values)] for i in range(num_samples)]
