"""Long tests of robustness, for an otherwise idle machine: `make stress`.

python tests/stress.py kills --count 200       # and files, disk, soak; see --help
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import checkpoint, cli
from common.checkpoint import saved
from lesson_05 import train_mnist
from lesson_05.options import DDPMOptions

import hypothesis
import torch
from helpers import metrics, same

NETWORK = {
    "channels": 4,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [],
    "num_groups": 2,
}


def train(folder: str, steps: int = 40, quiet: bool = True, **changes: Any) -> None:
    """A tiny run of lesson 5, started or resumed, that saves after each step."""
    if quiet:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    settings = {"preview_every": 10, "log_every": 3, "num_previews": 2, "checkpoint_every": 1}
    settings |= {"num_timesteps": 40, "batch_size": 4, "num_warmup_steps": 2, "num_samples": 0}
    options = DDPMOptions(
        output_dir=folder,
        resume="auto",
        device="cpu",
        precision="float32",
        dataset="digits",
        num_training_steps=steps,
        **settings | changes,
    )
    train_mnist.main(options, NETWORK)


def peak_memory() -> float:
    """The peak memory of this process so far, in MB."""
    import resource  # not on Windows

    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def quick_context() -> Any:
    """A context whose new processes have imported everything, where the system allows it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    modules = ["stress", "sklearn.datasets", "torchvision.utils", "matplotlib.figure", "PIL.Image"]
    context.set_forkserver_preload(modules)
    return context


def kills(count: int, folder: Path, seed: int = 0, steps: int = 40) -> dict[str, float]:
    """Kill runs at random moments, `count` times; each run must end like an undisturbed one."""
    random_numbers, context = random.Random(seed), quick_context()
    start(context, folder / "whole", steps).join()
    whole = checkpoint.load(saved(folder / "whole")[-1])
    result = {"kills": 0, "while writing": 0, "runs": 0}
    while result["kills"] < count:
        run = folder / f"run_{result['runs']}"
        hit = True
        while hit:
            hit = start_and_kill(context, run, steps, random_numbers)
            result["while writing"] += bool(list(run.glob(".*.part")))
            result["kills"] += hit
            if saved(run):
                step = checkpoint.load(saved(run)[-1]).step  # valid, whenever the run was killed
                assert len(saved(run)) <= 3, "more than two checkpoints and a new one"
        ended = checkpoint.load(saved(run)[-1])
        assert step == steps
        assert same(whole.tensors, ended.tensors), f"{run} ended with other weights"
        assert same(whole.training, ended.training)
        assert metrics(run) == metrics(folder / "whole")
        assert not list(run.glob(".*.part"))
        result["runs"] += 1
        shutil.rmtree(run)
    return result


def start_and_kill(context: Any, run: Path, steps: int, random_numbers: random.Random) -> bool:
    """Start or resume a run and kill it at a random moment. Returns whether it was still
    running."""
    files, process = saved(run)[-1:], start(context, run, steps)
    if random_numbers.random() < 0.1:
        process.join(random_numbers.uniform(0, 1))  # most likely before it saves anything
    else:
        while process.exitcode is None and saved(run)[-1:] == files:
            process.join(0.005)
        if random_numbers.random() < 0.5:
            while process.exitcode is None and not list(run.glob(".*.part")):
                pass
        else:
            process.join(random_numbers.uniform(0, 0.3))
    hit = process.exitcode is None
    process.kill()
    process.join()
    assert hit or process.exitcode == 0, f"a run ended with {process.exitcode}"
    return hit


def start(context: Any, folder: Path, steps: int) -> Any:
    process = context.Process(target=train, args=(str(folder), steps))
    process.start()
    return process


def soak(minutes: float, folder: Path) -> dict[str, float]:
    """Tiny training with previews and saves; memory, open files and disk must not grow."""
    words = [sys.executable, __file__, "run", "--folder", str(folder / "soak")]
    process = subprocess.Popen(
        [*words, "--count", "10000000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    seen = []
    begin = time.monotonic()
    try:
        while time.monotonic() - begin < 60 * minutes and process.poll() is None:
            time.sleep(min(10.0, 6 * minutes))
            status = Path(f"/proc/{process.pid}/status").read_text()
            kilobytes = next(line.split()[1] for line in status.splitlines() if "VmRSS" in line)
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            disk = [
                path.stat().st_size for path in (folder / "soak").glob("checkpoint_*.safetensors")
            ]
            seen.append((time.monotonic() - begin, int(kilobytes) / 1e3, files, len(disk)))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    settled = [entry for entry in seen if entry[0] > 60 * minutes / 6]
    first, last = settled[0], settled[-1]
    steps = checkpoint.load(saved(folder / "soak")[-1]).step
    result = {
        "steps": steps,
        "MB after a sixth": first[1],
        "MB at the end": last[1],
        "growth in percent": 100 * (last[1] / first[1] - 1),
        "most open files": max(entry[2] for entry in settled),
        "fewest open files": min(entry[2] for entry in settled),
        "most checkpoints": max(entry[3] for entry in seen),
    }
    assert result["growth in percent"] < 2, result
    assert result["most open files"] - result["fewest open files"] <= 4, result
    assert result["most checkpoints"] <= 3, result
    return result


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A disk of that size; only root can create it."""
    folder.mkdir()
    size = f"size={kilobytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def disk(count: int, folder: Path) -> dict[str, float]:
    """Runs on `count` disks, all too small. Each ends with one line, and its checkpoints load."""
    full = loaded = 0
    for number in range(count):
        with small_disk(folder / f"disk_{number}", 150 + 650 * number // count) as place:
            words = [sys.executable, __file__, "run", "--folder", str(place / "run")]
            run = subprocess.run(words, capture_output=True, text=True, check=False)
            last = run.stderr.strip().splitlines()[-1]
            assert run.returncode == 2, run.stderr
            assert last.startswith("error: "), last
            assert "Traceback" not in run.stderr, run.stderr
            full += "No space left" in last
            for path in saved(place / "run"):
                checkpoint.load(path)
                loaded += 1
    return {"runs": count, "that the full disk ended": full, "checkpoints that load": loaded}


def kinds(folder: Path) -> dict[str, tuple[Any, Callable[[Any], str | None]]]:
    """For each kind of file, its strategy and the function that reads it."""
    import hostile_checkpoints  # imported here, as it is slow
    import hostile_files

    def writing(read: Callable[[Path], str | None]) -> Callable[[bytes], str | None]:
        def reading(data: bytes) -> str | None:
            path = folder / "file"
            path.write_bytes(data)
            return read(path)

        return reading

    def read_idx(four: dict[str, bytes]) -> str | None:
        return hostile_files.read_idx(hostile_files.write_idx(folder, four))

    checkpoints = hostile_checkpoints.checkpoint_files
    return {
        "checkpoints": (checkpoints, writing(hostile_checkpoints.read_checkpoint)),
        "training": (checkpoints, writing(hostile_checkpoints.read_training)),
        "resumed": (checkpoints, writing(hostile_files.read_resumed)),
        "IDX": (hostile_files.idx_files(), read_idx),
        "YAML": (hostile_files.yaml_files(), writing(hostile_files.read_preset)),
        "PNG": (hostile_files.png_files(), writing(hostile_files.read_png)),
    }


def files(count: int, folder: Path, seed: int = 0) -> dict[str, float]:
    """Read `count` changed files of each kind; returns how many are still valid."""
    result: dict[str, float] = {}
    warnings.simplefilter("ignore")  # of zipfile and torch, about deliberate damage
    for name, (strategy, read) in kinds(folder).items():
        began = time.monotonic()
        lines = read_all(strategy, read, count, seed)
        valid = sum(line is None for line in lines)
        result |= {f"{name} tried": len(lines), f"{name} valid": valid}
        print(f"{name}: {len(lines)} tried, {time.monotonic() - began:.0f} s", flush=True)
    assert not (Path.cwd() / "evil-was-here").exists()
    assert peak_memory() < 2000, f"{peak_memory()} MB"
    return result


def read_all(
    strategy: Any, read: Callable[[Any], str | None], count: int, seed: int, at_once: int = 1000
) -> list[str | None]:
    """The results of reading `count` files, in blocks: Hypothesis keeps a block in memory."""
    lines = []

    def one(data: Any) -> None:
        lines.append(read(data))

    for first in range(0, count, at_once):
        settings = hypothesis.settings(
            max_examples=min(at_once, count - first),
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            verbosity=hypothesis.Verbosity.quiet,
        )
        hypothesis.seed(seed * 10**6 + first)(settings(hypothesis.given(strategy)(one)))()
    return lines


def processes(count: int, folder: Path) -> dict[str, float]:
    """Gradients of 2 and of `count` processes, and a run that two torchruns share."""
    import torchrun

    result, began = {}, time.monotonic()
    for number in (2, count):
        torchrun.torchrun(folder / str(number), "gradients", "--nproc-per-node", str(number))
        worst = torchrun.check_gradients(folder / str(number), number)
        result[f"largest difference of {number} processes' gradients"] = worst
    two = torchrun.two_machines(folder / "machines")
    torchrun.check_equal_to_one_process(two / "run", folder / "alone")
    return {**result, "seconds": time.monotonic() - began}


def one_run(folder: Path, steps: int) -> None:
    """One run that prints its errors as on a command line."""

    def main() -> None:
        train(str(folder), steps, quiet=False)

    cli.run(main, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kills", "files", "disk", "soak", "processes", "run"])
    parser.add_argument(
        "--count",
        type=int,
        default=200,
        help="number of kills, disks, files of each kind, or processes",
    )
    parser.add_argument("--minutes", type=float, default=30, help="duration of the soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="output folder of a run")
    words = parser.parse_args()
    torch.set_num_threads(1)
    if words.what == "run":
        return one_run(words.folder, words.count)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tasks: dict[str, Callable[[], dict[str, float]]] = {
            "kills": lambda: kills(words.count, Path(folder), words.seed),
            "disk": lambda: disk(words.count, Path(folder)),
            "soak": lambda: soak(words.minutes, Path(folder)),
            "processes": lambda: processes(words.count, Path(folder)),
            "files": lambda: files(words.count, Path(folder), words.seed),
        }
        result = tasks[words.what]()
    for name, value in result.items():
        print(f"{name}: {value:.6g}")
    print(f"{time.monotonic() - began:.0f} s, at most {peak_memory():.0f} MB")


if __name__ == "__main__":
    main()
