"""The speed of lesson 5 before and after a change: a commit and the current files, in turns.

python -m benchmarks.speed.before --commit 94eae1f
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks import records
from benchmarks.speed.timing import three_digits
from common import cli
from common.device import hardware, pick_device
from common.errors import UserError, check_at_least, one_line
from common.files import ROOT, write_atomically

import torch
from tqdm import tqdm

Network = Literal["laptop", "text", "paper"]
STEPS = Path(__file__).with_name("steps.py")
NAMES = {
    "laptop": "laptop preset, 64 images",
    "text": "the same with prompts",
    "paper": "the paper's network, 16 images",
}


def main(
    commit: str,
    networks: Sequence[Network] = ("laptop", "text", "paper"),
    repeats: int = 3,
    steps: int = 10,
    output_dir: str | None = None,
    device: str = "auto",
) -> None:
    """Measure and write before.md and before.json: the median over turns of a step's median time.

    Args:
        commit: the commit to compare with; its files are unpacked into a temporary folder.
        networks: laptop and paper are lesson 5's presets; text is the laptop preset of
            text_to_image.
        repeats: turns of each version, every turn in its own process.
        steps: steps of each kind in a turn, after two that are not counted.
        output_dir: folder for the files; benchmarks/output/before unless given.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    check_at_least(1, repeats=repeats, steps=steps)
    folder = records.output_folder(output_dir, "before")
    place = pick_device(device)
    turns: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as temporary:
        roots = {"before": unpack(commit, Path(temporary) / "before"), "after": ROOT}
        for _ in tqdm(range(repeats), desc="turns", unit="turn", disable=None):
            for name, root in roots.items():
                words = [str(STEPS), str(place), str(steps), *networks]
                turns[name].append(json.loads(run(words, root).splitlines()[-1]))
    seconds = {
        name: {key: statistics.median(turn[key] for turn in rows) for key in rows[0]}
        for name, rows in turns.items()
    }
    result = {
        "hardware": hardware(place),
        "before": commit,
        "after": records.commit(),
        "torch": torch.__version__,
        "repeats": repeats,
        "seconds": seconds,
        "turns": turns,
    }
    records.write_json(folder / "before.json", result)
    write_atomically(folder / "before.md", report(result).encode())
    print(report(result) + f"\n{folder}/before.md, before.json")


def unpack(commit: str, folder: Path) -> Path:
    """The files of a commit, in a new folder."""
    folder.mkdir()
    words = ["git", "-C", str(ROOT), "archive", "--format=tar", commit]
    try:
        archive = subprocess.run(words, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", b"") or b"git is not installed").decode()
        raise UserError(f"commit {commit!a} cannot be unpacked ({one_line(reason, 200)})") from None
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def run(words: Sequence[str], root: Path) -> str:
    """The output of a script that imports the packages in that folder."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{root} cannot be measured: {lines[-1]}")
    return done.stdout


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    before, after = result["seconds"]["before"], result["seconds"]["after"]
    lines = [
        f"Milliseconds of a step, medians of {result['repeats']} turns; {result['hardware']}; "
        f"torch {result['torch']}; commits {result['before']} and {result['after']}.",
        "",
        "| | before | after | speed-up |",
        "|---|---|---|---|",
    ]
    for key, seconds in after.items():
        name, what = key.split(", ")
        lines.append(
            f"| {NAMES[name]}, {what} | {three_digits(1e3 * before[key])} "
            f"| {three_digits(1e3 * seconds)} | {before[key] / seconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
