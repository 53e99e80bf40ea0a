"""One training run in several processes, as torchrun starts them: a GPU each, or CPU cores.

    torchrun --nproc-per-node 4 train_mnist.py

Every process runs the same script on the same random numbers: all draw the whole batch, its t and
its noise. Only the network is shared out: each process computes it for its part of the batch, and
all receive the whole output. So loss, log, loss-aware sampler and average need not know of it, and
the run is the one that a single process would do. Only process 0 writes and says anything.

Without torchrun there is one process, number 0, and nothing here costs anything.
"""

import gc
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from common.errors import UserError

MEETING = timedelta(minutes=10)  # from the first process to the last
PATIENCE = timedelta(hours=1)  # process 0 may sample for so long while the others wait
SIGNATURE = ".torchrun"


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def rank() -> int:
    """The number of this process among all of them."""
    return int(os.environ["RANK"]) if launched() else 0


def count() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def restarted(folder: Path) -> bool:
    """Whether this process goes on with a run that torchrun began there, as one of it had ended."""
    if not launched():
        return False
    # The number of restarts is counted for each machine by itself; the name of the run is common.
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if nameless() and rank() > 0:
        return again  # process 0 alone can tell whose the folder is, and ends all if it is not ours
    file = folder / SIGNATURE
    return (again or not nameless()) and file.exists() and file.read_text() == signature()


def nameless() -> bool:
    """Whether torchrun was given no --rdzv-id."""
    return os.environ["TORCHELASTIC_RUN_ID"] == "none"


def signature() -> str:
    """The name of the run; without one, the torchrun that has begun it and all its lives."""
    return f"torchrun {os.getppid()}" if nameless() else os.environ["TORCHELASTIC_RUN_ID"]


def sign(folder: Path) -> None:
    """Leave word for `restarted` of whose folder it is."""
    if launched() and rank() == 0:
        (folder / SIGNATURE).write_text(signature())


def own_device(device: torch.device) -> torch.device:
    """Of several GPUs, the one of this process."""
    if count() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"several processes cannot share {device.type}: add --device cpu")
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise UserError(f"there are more processes than GPUs here: --nproc-per-node {there}")
    return torch.device("cuda", number)


def join(device: torch.device) -> None:
    """Meet the other processes."""
    if count() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch

        try:
            store = own_store(next(rendezvous("env://", timeout=MEETING))[0])
            dist.init_process_group(
                backend, store=store, rank=rank(), world_size=count(), timeout=PATIENCE
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(f"the processes of this run did not meet ({reason})") from None


def own_store(store: Any) -> Any:
    """Of the store by which processes find each other, a part that no earlier life has used.

    torchrun keeps one store for all lives of a run, and a process could find the address of one
    that has ended there. So each asks process 0, by a word never used before, for the new part.
    """
    if rank() > 0:
        word = secrets.token_hex(8)
        store.set(f"asks/{rank()}", word)
        part = store.get(f"answer/{word}").decode()
        store.set(f"heard/{part}/{rank()}", "")
        return dist.PrefixStore(part, store)
    part, waiting = secrets.token_hex(8), set(range(1, count()))
    end = time.monotonic() + MEETING.total_seconds()
    while waiting:
        for other in list(waiting):
            if store.check([f"heard/{part}/{other}"]):
                waiting.remove(other)
            elif store.check([f"asks/{other}"]):
                store.set("answer/" + store.get(f"asks/{other}").decode(), part)
        if time.monotonic() > end:
            raise RuntimeError(f"{len(waiting)} did not come")
        time.sleep(0.02)
    return dist.PrefixStore(part, store)


def leave() -> None:
    """Part from the others; what follows is for process 0 alone."""
    if dist.is_available() and dist.is_initialized():
        wait()
        while SHARES:
            SHARES.pop().part()
        # DistributedDataParallel must not be the last to hold the group: it would end it with
        # Python's lock in its hand, for which a thread of the group's may be waiting.
        gc.collect()
        dist.destroy_process_group()


def together() -> bool:
    return count() > 1 and dist.is_initialized()


def wait() -> None:
    """Until all processes are here."""
    largest(0)


def largest(value: int) -> int:
    """The largest of the processes' values, for all of them."""
    if not together():
        return value
    one = torch.tensor(value)
    dist.all_reduce(one, dist.ReduceOp.MAX)
    return int(one)


def agree(values: dict[str, Any]) -> None:
    """Refuse to go on where another process has another value of something."""
    if not together():
        return
    everyone: list[dict[str, Any]] = [{}] * count()
    dist.all_gather_object(everyone, values)
    for number, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other.get(name) != value:
                raise UserError(
                    f"process {number} differs from process 0 in {name} ({other.get(name)}, not "
                    f"{value}): give all the same flags and, on several machines, one shared "
                    "--output_dir"
                )


@contextmanager
def one_first() -> Iterator[None]:
    """On each machine one process goes first, so that it can fetch what the others then find."""
    first = not launched() or int(os.environ["LOCAL_RANK"]) == 0
    if not first:
        wait()
    yield
    if first:
        wait()


def lost(error: BaseException) -> bool:
    """Whether this is how the end of another process shows here."""
    named = any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "ProcessGroup"))
    return together() and isinstance(error, RuntimeError) and named


SHARES: WeakSet["Share"] = WeakSet()  # those that hold the group


class Share(nn.Module):
    """The network, of which each process computes its part of the batch: (B, ...) -> (B, ...).

    In its values and gradients it is the network itself, on the whole batch; the batch need not
    be a multiple of the processes. Inside, DistributedDataParallel averages the gradients.
    Differs: dropout draws other masks than one process would, and others in each process.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        ids = [device] if device.type == "cuda" else None
        self.parallel = DistributedDataParallel(model, device_ids=ids)
        SHARES.add(self)

    def part(self) -> None:
        """Let go of the other processes; the network is not asked again."""
        del self.parallel

    def forward(self, xt: Tensor, *args: Any, **condition: Any) -> Tensor:
        B, N, k = len(xt), count(), rank()
        if B < N:
            raise UserError(f"batch_size is {B}: {N} processes need at least {N}")
        begin, end = k * B // N, (k + 1) * B // N
        args, condition = cut(((xt, *args), condition), lambda batch: Part.apply(batch, begin, end))
        with own_random_numbers(xt.device, k):
            own = self.parallel(*args, **condition)
        return Whole.apply(own, begin, B)


def cut(batches: Any, take: Callable[[Tensor], Tensor]) -> Any:
    """Take from each tensor in tuples and dicts of them."""
    if isinstance(batches, Tensor):
        return take(batches)
    if isinstance(batches, dict):
        return {name: cut(value, take) for name, value in batches.items()}
    parts = [cut(value, take) for value in batches]
    return tuple(parts) if type(batches) is tuple else type(batches)(*parts)


@contextmanager
def own_random_numbers(device: torch.device, number: int) -> Iterator[None]:
    """For dropout: other numbers in each process, and the common ones untouched."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        common = int(torch.randint(2**62, (1,), device=device))
        torch.manual_seed(common + number)
        yield


class Part(torch.autograd.Function):
    """Images begin to end of a batch that all processes have. Its gradient is the whole batch's."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, begin: int, end: int) -> Tensor:
        ctx.begin, ctx.size = begin, len(whole)
        return whole[begin:end]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return summed(grad, ctx.begin, ctx.size) / count(), None, None


class Whole(torch.autograd.Function):
    """The whole batch from the processes' parts of it.

    All processes then have the same loss and the same gradient of it. DistributedDataParallel will
    take the mean over processes where the parts' gradients must be added: hence the factor.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, begin: int, size: int) -> Tensor:
        ctx.part = slice(begin, begin + len(own))
        return summed(own, begin, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.part] * count(), None, None


def summed(own: Tensor, begin: int, size: int) -> Tensor:
    """A batch of `size`, to which each process brings the images from its `begin` on."""
    whole = own.new_zeros(size, *own.shape[1:])
    whole[begin : begin + len(own)] = own
    dist.all_reduce(whole)
    return whole


class InParts(nn.Module):
    """The network on a batch cut into parts, so that only one part's memory is held at a time.

    The price: going back, each part is computed once more.
    """

    def __init__(self, model: nn.Module, parts: int) -> None:
        super().__init__()
        self.model, self.parts = model, parts

    def forward(self, xt: Tensor, *args: Any, **condition: Any) -> Tensor:
        outputs = []
        size = -(-len(xt) // self.parts)
        for begin in range(0, len(xt), size):
            part = slice(begin, begin + size)
            chosen, named = cut(((xt, *args), condition), itemgetter(part))
            outputs.append(checkpoint(self.model, *chosen, use_reentrant=False, **named))
        return torch.cat(outputs)
