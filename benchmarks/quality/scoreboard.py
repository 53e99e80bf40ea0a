"""Measure every row of the README's tables, the scoreboard, from the shipped checkpoints."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality import tables
from benchmarks.quality.evaluate import Evaluation, check_numbers, print_row, setup
from benchmarks.quality.metrics import Reference
from benchmarks.quality.rows import REAL, ROWS, STRIPS, Row, plan_options
from benchmarks.quality.samples import SamplePlan
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
    """Measure the rows, report which metrics differ from the stored ones, and write table.md
    and fid.png.

    An interrupted run resumes: what was measured with the same checkpoint and flags is reused.

    Args:
        rows: names of rows; all unless given. none measures nothing, and makes the tables and the
            picture of the stored results.
        num_samples: samples for every row; as in evaluate.py unless given.
        num_images: test images for bits per dimension, of rows that take all steps; 0 for none.
        num_terms: terms of the bound drawn for each image.
        fresh: measure again the rows that output_dir holds already.
        store: write the results into benchmarks/scoreboard, and tables into the READMEs.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        output_dir: folder for the rows; benchmarks/output/scoreboard unless given.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic while sampling; auto is bfloat16 where the hardware
            has it.
    """
    check_numbers(num_samples, num_images, num_terms)
    chosen = choose(rows)
    folder = output_folder(output_dir, "scoreboard")
    stored = read_json(STORED / "results.json")
    results: dict[str, Any] = {}
    if chosen:
        reference = Reference(load_images("mnist", data_dir), pick_device(device))
    for name, row in chosen.items():
        print(f"\n{name}", flush=True)
        if fresh:
            shutil.rmtree(folder / name, ignore_errors=True)
        if row is None:
            results[name] = measure_real(reference, num_samples or 2000, folder / name)
        elif (ROOT / row.checkpoint).exists():
            options = plan_options(row)
            options.device, options.precision, options.num_samples = device, precision, num_samples
            plan = SamplePlan(str(ROOT / row.checkpoint), options)
            images = num_images if row.num_steps in (None, 1000) else 0  # one bound a network
            evaluation = Evaluation(plan, reference, images, num_terms)
            results[name] = measure(evaluation, folder / name)
        else:
            print(f"skipped: there is no {row.checkpoint}")
            continue
        print_row(results[name])
        print("\n".join(changes(results[name], stored.get(name))))
        write_json(folder / "results.json", results)
    # What older code has measured lacks the numbers of the tables.
    merged = {n: r for n, r in (stored | results).items() if "network_calls" in r}
    merged = {name: merged[name] for name in [*ROWS, REAL] if name in merged}
    if shown := results or merged:
        write_outputs(shown, folder)
        print(f"\n{folder}/table.md, fid.png, results.json, and a folder for each row")
    if store:
        store_results(merged, list(results), folder)


def write_outputs(results: dict[str, Any], folder: Path) -> None:
    """All rows as Markdown, and the picture."""
    text = tables.sample_tables(results, short=False) + "\n" + tables.likelihood_table(results)
    write_atomically(folder / "table.md", text.encode())
    if set(results) != {REAL}:
        tables.save_picture(folder / "fid.png", results)


def choose(names: list[str] | None) -> dict[str, Row | None]:
    """The rows by name; None is the row of real images."""
    known = {**ROWS, REAL: None}
    if names == ["none"]:
        return {}
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
    rest = {"network_calls": None, "bits_per_dim": None, "guidance": None}
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


def store_results(results: dict[str, Any], measured: list[str], folder: Path) -> None:
    """Write results and pictures into benchmarks/scoreboard, and the tables into the READMEs."""
    make_folder(STORED)
    write_json(STORED / "results.json", results)
    write_outputs(results, STORED)
    for picture in STORED.glob("*.png"):
        if picture.stem not in [*STRIPS, "fid"]:
            picture.unlink()  # of a row that is not shown any more
    for name in set(measured) & set(STRIPS):
        shutil.copy(folder / name / "strip.png", STORED / f"{name}.png")
    pictures = "benchmarks/scoreboard"
    parts = [
        f"![FID against calls of the network]({pictures}/fid.png)\n",
        f"± is one standard error. [All rows]({pictures}/table.md).\n",
        tables.sample_tables(results, short=True),
        tables.likelihood_table(results),
        tables.strips(results, pictures),
    ]
    if not put(ROOT / "README.md", "scoreboard", "\n".join(parts)):
        raise UserError(f"{ROOT / 'README.md'} has no lines <!-- scoreboard --> for the tables")
    put(ROOT / "lesson_06" / "README.md", "eta_table", tables.eta_table(results))
    put(ROOT / "lesson_09" / "README.md", "variance_table", tables.variance_table(results))
    print(f"stored in {STORED} and in the READMEs")


def put(readme: Path, name: str, text: str) -> bool:
    """Put the text between <!-- NAME --> and <!-- /NAME -->; whether the file has them."""
    whole = readme.read_text(encoding="utf-8") if readme.exists() else ""
    top, found, rest = whole.partition(f"<!-- {name} -->")
    _, ended, bottom = rest.partition(f"<!-- /{name} -->")
    if found and ended:
        write_atomically(readme, f"{top}{found}\n{text}{ended}{bottom}".encode())
    return bool(found and ended)


if __name__ == "__main__":
    cli.run(main, resumes=True)
