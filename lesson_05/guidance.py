"""Classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598), "HoSalimans22".

A network that has learned with its condition and, now and then, with a learned null in its place,
can be asked for more of the condition than it would give by itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from lesson_05.ddpm import DDPM, Network

V = TypeVar("V")


class Guided:
    """The noise estimate, moved away from the unconditional one [HoSalimans22 Eq. 6].

    ε̂ = ε̂(xt, t, ∅) + s (ε̂(xt, t, c) - ε̂(xt, t, ∅))

    s = 1 is the plain conditional estimate, s = 0 the unconditional one: one evaluation each. Any
    other s takes both, in one batch of twice the size. A process sees an ordinary network.
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
        if not 0 <= scale < float("inf"):
            raise UserError(f"guidance is {scale}: it must be at least 0; 1 is plain conditional")
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
    """For training: with this probability, for each image by itself, the null is its condition
    [HoSalimans22 Algorithm 1]. condition, null (B, ...)."""
    if not 0 <= probability <= 1:
        raise UserError(f"drop_probability is {probability}: it must be from 0 to 1")
    dropped = torch.rand(len(condition), device=condition.device) < probability
    return torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), null, condition)


def in_turn(values: Sequence[V], num_samples: int, name: str) -> list[V]:
    """One value a sample: the first, the second, ..., and after the last the first again."""
    if num_samples < 1:
        raise UserError(f"num_samples is {num_samples}: it must be at least 1")
    if not 1 <= len(values) <= num_samples:
        raise UserError(
            f"{len(values)} {name} for {num_samples} samples: give 1 to {num_samples} of them "
            f"(fewer are repeated in turn), or --num_samples {max(len(values), 1)}"
        )
    return [values[i % len(values)] for i in range(num_samples)]


@torch.no_grad()
def sample_each(
    process: DDPM,
    bind: Callable[[Tensor], Network],
    conditions: Tensor,
    shape: tuple[int, int, int],
    clip_x0: bool = True,
) -> Tensor:
    """Algorithm 2 for each of the conditions (N, ...), 64 at a time -> x0 (N, C, H, W), on the CPU.

    bind(some of the conditions) is the network to sample for these.
    """
    device, batches = process.signal_rate.device, []
    chunks = conditions.to(device).split(64)
    with tqdm(total=len(chunks) * process.num_timesteps, unit="step", desc="sampling") as bar:
        for chunk in chunks:
            x_T = torch.randn(len(chunk), *shape, device=device)
            x0 = process.sample(bind(chunk), x_T, clip_x0, lambda t, xt: bar.update() and None)
            batches.append(x0.cpu())
    return torch.cat(batches)
