"""Comparison of our U-Nets with diffusers' UNet2DModel, weight by weight."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def perturb(network: nn.Module, deviation: float) -> None:
    """Add noise to every weight, so that none stays at its initial zero or one."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(deviation * torch.randn_like(parameter))


def copy_weights(
    theirs: nn.Module, ours: nn.Module, join: Callable[[list[Tensor]], Tensor]
) -> None:
    """Copy every weight of diffusers' network to ours.

    Args:
        join: makes our one weight from theirs of the queries, keys and values.
    """
    weights, state = theirs.state_dict(), {}
    for name in ours.state_dict():
        if ".qkv." in name:
            parts = [diffusers_name(name).replace("qkv", f"to_{part}") for part in "qkv"]
            state[name] = join([weights.pop(part) for part in parts])
        else:
            state[name] = weights.pop(diffusers_name(name))
    assert not weights  # all of theirs were used
    ours.load_state_dict(state)


@torch.no_grad()
def assert_equal_outputs(ours: nn.Module, theirs: nn.Module, times: Sequence[int]) -> None:
    """On 32x32 colour images, at each time; ours counts times from 1, theirs from 0."""
    xt = torch.randn(2, 3, 32, 32)
    for t in times:
        out = ours(xt, torch.tensor([t, t]))
        expected = theirs(xt, torch.tensor([t - 1, t - 1])).sample
        assert (out - expected).abs().max() < 1e-4
        assert out.std() > 0.1


def diffusers_name(ours: str) -> str:
    """The name in diffusers' UNet2DModel, with two blocks a level, of a weight of our network."""
    head, _, rest = ours.partition(".")
    if head in ("conv_in", "conv_out"):
        return ours
    if head == "norm_out":
        return f"conv_norm_out.{rest}"
    if head == "time":
        return f"time_embedding.linear_{1 if rest[0] == '0' else 2}.{rest[2:]}"
    index, _, rest = rest.partition(".")
    level, number = divmod(int(index), 3 if head == "down" else 4)
    prefix = f"{head}_blocks.{level}"
    if head == "middle":
        number, prefix = int(index), "mid_block"
    if rest.startswith("residual."):
        rest = rest.removeprefix("residual.").replace("shortcut", "conv_shortcut")
        return f"{prefix}.resnets.{number}.{rest.replace('time', 'time_emb_proj')}"
    if rest.startswith("attention."):
        rest = rest.removeprefix("attention.").replace("norm", "group_norm")
        return f"{prefix}.attentions.{number}.{rest.replace('out.', 'to_out.0.')}"
    return f"{prefix}.{'down' if head == 'down' else 'up'}samplers.0.conv.{rest}"
