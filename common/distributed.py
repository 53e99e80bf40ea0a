"""One training run in several processes, as torchrun starts them: one GPU or a few cores each.

    torchrun --nproc-per-node 4 train_mnist.py

Every process draws the same whole batch, with its t and its noise, and computes the loss of its own
rows. DistributedDataParallel averages the gradients, so they are those of the whole batch. Only
process 0 writes files and prints. Without torchrun there is one process, with rank 0.
"""

import gc
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

from common.device import forked_rng, random_states
from common.errors import UserError

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

TIMEOUT = timedelta(hours=1)  # how long process 0 may sample while the others wait


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched() and "RANK" in os.environ


def number(name: str, default: int) -> int:
    """A number that torchrun puts into the environment."""
    value = os.environ.get(name, "")
    return int(value) if launched() and value.isdecimal() else default


def rank() -> int:
    """The number of this process, from 0 to world_size() - 1."""
    return number("RANK", 0)


def world_size() -> int:
    return number("WORLD_SIZE", 1)


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, if each process has one."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if launched() else ():
        if number(name, -1) < 0:
            raise UserError(
                f"torchrun's variable {name} is {os.environ.get(name, '')!r}, not a number: start "
                "the script with torchrun, or unset RANK"
            )
    if world_size() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"several processes cannot share {device.type}: add --device cpu")
    own, available = number("LOCAL_RANK", 0), torch.cuda.device_count()
    if own >= available:
        raise UserError(f"more processes than GPUs: use --nproc-per-node {available}")
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def init(device: torch.device) -> None:
    """Connect to the other processes."""
    if world_size() == 1 or dist.is_initialized():
        return
    from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store = unused_part(next(rendezvous("env://"))[0])
        dist.init_process_group(
            backend, store=store, rank=rank(), world_size=world_size(), timeout=TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"the processes of this run could not connect ({reason}): start them all with torchrun"
        ) from None


def unused_part(store: Any) -> Any:
    """A part of torchrun's store that is new. torchrun keeps its store when it restarts a run, and
    with it the addresses of processes that have ended.

    Process 0 chooses the part. Each other process asks for it with a word of its own, so that it
    cannot mistake an answer from before the restart for its own.
    """
    if rank() > 0:
        word = secrets.token_hex(8)
        store.set(f"question/{rank()}", word)
        part = store.get(f"answer/{word}").decode()
        store.set(f"heard/{part}/{rank()}", "")
        return dist.PrefixStore(part, store)
    part, start = secrets.token_hex(8), time.monotonic()
    answered: set[int] = set()
    while len(answered) < world_size() - 1:
        for other in range(1, world_size()):
            if store.check([f"question/{other}"]):
                word = store.get(f"question/{other}").decode()
                store.set(f"answer/{word}", part)
                if store.check([f"heard/{part}/{other}"]):
                    answered.add(other)
        if time.monotonic() - start > 600:
            raise RuntimeError("not all processes started within 10 minutes")
        time.sleep(0.02)
    return dist.PrefixStore(part, store)


def leave() -> None:
    """Wait for the other processes and disconnect. Only process 0 goes on."""
    if connected():
        all_reduce_max(0)
        gc.collect()  # a DistributedDataParallel that is collected later could block on the group
        dist.destroy_process_group()


def connected() -> bool:
    return dist.is_available() and dist.is_initialized()


def shard(*batch: Tensor) -> tuple[Tensor, ...]:
    """This process's rows of each tensor (B, ...). B is a multiple of world_size()."""
    if not connected():
        return batch
    return tuple(tensor.chunk(world_size())[rank()] for tensor in batch)


def gather(rows: Tensor) -> Tensor:
    """The whole batch (B, ...) from all processes' rows, detached."""
    rows = rows.detach()
    if not connected():
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def all_reduce_max(value: int) -> int:
    """The maximum of all processes' values."""
    if not connected():
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def check_agreement(values: dict[str, Any]) -> None:
    """Raise UserError unless all processes were started with the same values."""
    if not connected():
        return
    everyone: list[dict[str, Any]] = [{}] * world_size()
    dist.all_gather_object(everyone, values)
    names = [name for name in values if len({repr(other.get(name)) for other in everyone}) > 1]
    if names:
        raise UserError(
            f"the processes of this run differ in {', '.join(names)}: give all the same flags and, "
            "on several machines, one shared --output_dir"
        )


@contextmanager
def one_first() -> Iterator[None]:
    """On each machine one process runs the block first and downloads for the others."""
    first = not launched() or int(os.environ["LOCAL_RANK"]) == 0
    if not first:
        all_reduce_max(0)
    yield
    if first:
        all_reduce_max(0)


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error means that another process has ended."""
    named = any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "ProcessGroup"))
    return connected() and isinstance(error, RuntimeError) and named


class DataParallel(DistributedDataParallel):
    """DistributedDataParallel whose dropout masks differ between processes.

    The random stream that all processes share goes on as if dropout had drawn nothing.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with forked_rng(args[0].device):
            torch.manual_seed(int(torch.randint(2**62, ())) + rank())
            return super().forward(*args, **kwargs)


class Microbatches(nn.Module):
    """Computes the network on one part of the batch at a time: less memory, the same gradients.

    Only one part's activations are in memory. The backward pass recomputes each part.
    """

    def __init__(self, model: nn.Module, num_parts: int) -> None:
        super().__init__()
        self.model, self.num_parts = model, num_parts

    def forward(self, *batch: Any, **condition: Any) -> Tensor:
        parts = [split(value, self.num_parts) for value in (*batch, *condition.values())]
        outputs = []
        for part in zip(*parts, strict=True):
            args, values = part[: len(batch)], part[len(batch) :]
            named = dict(zip(condition, values, strict=True))
            # PyTorch itself would not save the random states of every kind of device.
            saving: Any = {
                "preserve_rng_state": False,
                "context_fn": partial(replay, args[0].device),
            }
            outputs.append(checkpoint(self.model, *args, use_reentrant=False, **saving, **named))
        return torch.cat(outputs)


def replay(device: torch.device) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts for a computation and for its repetition, which draws the same random numbers."""
    return nullcontext(), forked_rng(device, random_states(device))


def split(value: Any, num_parts: int) -> list[Any]:
    """A tensor (B, ...), or a named tuple of them, in parts of about B / num_parts rows."""
    if isinstance(value, Tensor):
        return list(value.chunk(num_parts))
    parts = zip(*(split(field, num_parts) for field in value), strict=True)
    return [type(value)(*part) for part in parts]
