"""Measure every row of the README's table, the scoreboard, from the shipped checkpoints."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.quality.evaluate import Evaluation, check_numbers, columns, print_row, setup
from benchmarks.quality.metrics import Reference
from benchmarks.quality.samples import PlanOptions, SamplePlan, Sampler
from benchmarks.records import output_folder, read_json, write_json
from common import cli
from common.data import from_uint8, load_images
from common.device import Precision, pick_device
from common.errors import UserError
from common.files import ROOT, make_folder, write_atomically
from common.pictures import save_grid

import numpy as np
import torch
from torch import Tensor

STORED = ROOT / "benchmarks" / "scoreboard"
MARKERS = "<!-- scoreboard -->", "<!-- /scoreboard -->"


class Row(NamedTuple):
    """A shipped checkpoint, and how it is sampled."""

    model: str
    checkpoint: str
    sampler: Sampler
    num_steps: int | None = None
    guidance: float = 1.0


DPM = "lesson_02/pretrained/mnist.safetensors"
DDPM = "lesson_05/pretrained/mnist.safetensors"
CLASSES = "lesson_05/class_conditional/pretrained/mnist.safetensors"
TEXT = "lesson_06/pretrained/text_to_image.safetensors"
HYBRID = "lesson_09/pretrained/mnist.safetensors"
VLB = "lesson_09/pretrained/vlb.safetensors"
ROWS = {
    "dpm": Row("DPM", DPM, "ddpm"),
    "ddpm": Row("DDPM", DDPM, "ddpm"),
    **{f"ddim_{S}": Row("DDPM, sampled by DDIM", DDPM, "ddim", S) for S in (100, 50, 20, 10)},
    "classes": Row("with labels, by DDIM", CLASSES, "ddim", 50),
    "classes_guided": Row("with labels, guidance 2, by DDIM", CLASSES, "ddim", 50, 2.0),
    "text": Row("with prompts, by DDIM", TEXT, "ddim", 50),
    "text_guided": Row("with prompts, guidance 2, by DDIM", TEXT, "ddim", 50, 2.0),
    **{
        f"hybrid_{S}": Row("IDDPM, L_hybrid", HYBRID, "strided", S) for S in (1000, 100, 50, 25, 10)
    },
    **{f"vlb_{S}": Row("IDDPM, L_vlb", VLB, "strided", S) for S in (1000, 100, 50, 25, 10)},
}
REAL = "real"
# A metric has moved if it differs from the stored one by more than this fraction. Other hardware
# rounds differently, so a few samples look different.
TOLERANCE = {
    "fid": 0.05,
    "share_sure": 0.01,
    "class_balance_bits": 0.01,
    "agreement": 0.01,
    "precision": 0.03,
    "recall": 0.03,
    "nearest_median": 0.02,
    "bits_per_dim": 0.01,
}


def main(
    rows: list[str] | None = None,
    num_samples: int | None = None,
    num_images: int = 1000,
    num_terms: int = 50,
    fresh: bool = False,
    store: bool = False,
    data_dir: str | None = None,
    output_dir: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Measure the rows, report which metrics differ from the stored ones, and write table.md.

    An interrupted run resumes: what was measured with the same checkpoint and flags is reused.

    Args:
        rows: names of rows; all unless given.
        num_samples: samples for every row; as in evaluate.py unless given.
        num_images: test images for bits per dimension; 0 for none.
        num_terms: terms of the bound drawn for each image.
        fresh: measure again the rows that output_dir holds already.
        store: write the results into benchmarks/scoreboard and the README.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        output_dir: folder for the rows; benchmarks/output/scoreboard unless given.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic while sampling; auto is bfloat16 where the hardware
            has it.
    """
    check_numbers(num_samples, num_images, num_terms)
    place = pick_device(device)
    chosen = choose(rows)
    folder = output_folder(output_dir, "scoreboard")
    reference = Reference(load_images("mnist", data_dir), place)
    stored = read_json(STORED / "results.json")
    results: dict[str, Any] = {}
    for name, row in chosen.items():
        print(f"\n{name}", flush=True)
        if fresh:
            shutil.rmtree(folder / name, ignore_errors=True)
        if row is None:
            results[name] = measure_real(reference, num_samples or 2000, folder / name)
        elif (ROOT / row.checkpoint).exists():
            options = PlanOptions(device=device, precision=precision, num_samples=num_samples)
            options.sampler, options.num_steps, options.guidance = row[2:]
            plan = SamplePlan(str(ROOT / row.checkpoint), options)
            evaluation = Evaluation(plan, reference, num_images, num_terms)
            results[name] = measure(evaluation, folder / name)
        else:
            print(f"skipped: there is no {row.checkpoint}")
            continue
        print_row(results[name])
        print("\n".join(changes(results[name], stored.get(name))))
        write_json(folder / "results.json", results)
        write_atomically(folder / "table.md", table(results, "").encode())
    print(f"\n{folder}/table.md, results.json, and a folder for each row")
    if store:
        store_results(results, folder)


def choose(names: list[str] | None) -> dict[str, Row | None]:
    """The rows by name; None is the row of real images."""
    known = {**ROWS, REAL: None}
    for name in names or []:
        if name not in known:
            raise UserError(f"row {name} is not known: choose from {', '.join(known)}")
    return {name: known[name] for name in names or known}


def measure(evaluation: Evaluation, folder: Path) -> dict[str, Any]:
    """The result of an earlier run with the same checkpoint and flags, or a new one."""
    result = read_json(folder / "result.json")
    settings = evaluation.settings()
    if result and settings.items() <= result.items():
        print(f"measured before, at commit {result['commit'][:12]}; --fresh true measures it again")
    else:
        result = evaluation.run(folder)
    with np.load(folder / "samples.npz", allow_pickle=False) as content:
        save_strip(folder, torch.from_numpy(content["samples"]))
    return result


def measure_real(reference: Reference, count: int, folder: Path) -> dict[str, Any]:
    """Training images in place of samples: the metrics of a perfect network."""
    make_folder(folder)
    real = reference.real(count)
    rest = {"num_steps": None, "bits_per_dim": None, "seconds_per_sample": None}
    result = {**real, "num_samples": count, "real": real, **rest, **setup(reference)}
    write_json(folder / "result.json", result)
    save_strip(folder, reference.data.train)
    return result


def save_strip(folder: Path, levels: Tensor) -> None:
    """The first ten samples, for the table."""
    save_grid(folder / "strip.png", from_uint8(levels[:10]), columns=10, scale=1)


def changes(result: Mapping[str, Any], stored: Mapping[str, Any] | None) -> list[str]:
    """A line for each metric that has moved from its stored value."""
    if stored is None:
        return ["there is no stored result to compare with"]
    lines = []
    if result.get("checkpoint_sha256") != stored.get("checkpoint_sha256"):
        lines.append("the stored metrics are of another checkpoint")
    if result["num_samples"] != stored["num_samples"]:
        return [*lines, f"not compared: the stored metrics are of {stored['num_samples']} samples"]
    for name, tolerance in TOLERANCE.items():
        new, old = value(result, name), value(stored, name)
        if new is None or old is None:
            continue
        if abs(new - old) > tolerance * abs(old):
            change = f", {100 * (new / old - 1):+.1f} %" if old else ""
            lines.append(f"moved: {name} from {old:.4g} to {new:.4g}{change}")
    return lines or ["as stored"]


def value(result: Mapping[str, Any], name: str) -> float | None:
    entry = result[name]
    return entry["total"]["mean"] if isinstance(entry, dict) else entry


def table(results: Mapping[str, Mapping[str, Any]], pictures: str) -> str:
    """The table in Markdown, one line per row.

    pictures: folder of the strips, NAME.png; "" if they are NAME/strip.png.
    """
    lines: list[str] = []
    for name, result in results.items():
        row = ROWS.get(name)
        source = f"{pictures}/{name}.png" if pictures else f"{name}/strip.png"
        model = row.model if row else "real training images"
        cells = {"model": model, "": f"![ten samples]({source})", **columns(result)}
        if not lines:
            lines = ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
        lines.append("| " + " | ".join(cells.values()) + " |")
    missing = [name for name in ROWS if name not in results]
    if missing:
        lines += ["", f"Not measured: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def store_results(results: dict[str, Any], folder: Path) -> None:
    """Write results and pictures into benchmarks/scoreboard, and the table into the README."""
    make_folder(STORED)
    merged = read_json(STORED / "results.json") | results
    merged = {name: merged[name] for name in [*ROWS, REAL] if name in merged}
    write_json(STORED / "results.json", merged)
    for name in results:
        shutil.copy(folder / name / "strip.png", STORED / f"{name}.png")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    top, found, rest = text.partition(MARKERS[0])
    _, ended, bottom = rest.partition(MARKERS[1])
    if not (found and ended):
        raise UserError(f"{readme} has no lines {MARKERS[0]} and {MARKERS[1]} for the table")
    text = f"{top}{MARKERS[0]}\n{table(merged, 'benchmarks/scoreboard')}{MARKERS[1]}{bottom}"
    write_atomically(readme, text.encode())
    print(f"stored in {STORED} and in {readme}")


if __name__ == "__main__":
    cli.run(main, resumes=True)
