"""The scoreboard: every row measured again, from the checkpoints that the lessons ship."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import checkpoint, cli, mnist
from common.device import Precision, pick_device
from common.errors import UserError
from common.evaluate import (
    Task,
    columns,
    default_count,
    evaluate,
    print_row,
    surroundings,
)
from common.images import from_uint8, save_grid
from common.metrics import Reference, check_count
from common.subject import ROOT, Sampler, Subject

STORED = ROOT / "benchmarks" / "scoreboard"
MARKERS = "<!-- scoreboard -->", "<!-- /scoreboard -->"


class Row(NamedTuple):
    """What is measured: a shipped checkpoint and a way to sample it."""

    model: str
    checkpoint: str
    sampler: Sampler
    num_steps: int | None = None
    guidance: float = 1.0


DDPM = "lesson_05/pretrained/mnist.pt"
CLASSES = "lesson_05/class_conditional/pretrained/mnist.pt"
TEXT = "lesson_06/pretrained/text_to_image.pt"
HYBRID = "lesson_09/pretrained/mnist.pt"
VLB = "lesson_09/pretrained/vlb.pt"
ROWS = {
    "dpm": Row("DPM", "lesson_02/pretrained/mnist.pt", "ddpm"),
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
# A figure has moved if it differs from the stored one by more than this share of that. Samples of
# other hardware round differently, and a few of them look different.
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
    """Measure the rows, say where a figure moved from the stored one, and write table.md.

    Started again after it was stopped, it goes on, with what it has of the same checkpoint and
    flags.

    Args:
        rows: some of them, by name; all unless given.
        num_samples: for every row; as in common/evaluate.py unless given.
        num_images: test images for bits per dimension; 0 leaves it out.
        num_terms: of the bound, drawn for each image.
        fresh: measure anew what was measured in output_dir before.
        store: keep what was measured in benchmarks/scoreboard and in the README.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        output_dir: folder of the rows; benchmarks/output/scoreboard unless given.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic while sampling; auto is bfloat16 where the hardware
            has it.
    """
    place = pick_device(device)
    chosen = choose(rows)
    folder = Path(output_dir) if output_dir else ROOT / "benchmarks" / "output" / "scoreboard"
    checkpoint.make_folder(folder)
    reference = Reference(mnist.load("mnist", data_dir), place)
    if num_samples is not None:
        check_count(num_samples, reference.model.num_features)
    stored = read(STORED / "results.json")
    results: dict[str, Any] = {}
    for name, row in chosen.items():
        print(f"\n{name}", flush=True)
        if row is None:
            results[name] = real_row(reference, num_samples or default_count(0), folder / name)
        elif (ROOT / row.checkpoint).exists():
            if fresh:
                shutil.rmtree(folder / name, ignore_errors=True)
            subject = Subject(
                str(ROOT / row.checkpoint), row.sampler, row.num_steps, row.guidance, place
            )
            count = num_samples or default_count(subject.steps)
            task = Task(subject, reference, count, num_images, num_terms, 0, precision)
            results[name] = kept(task, folder / name) or evaluate(task, folder / name)
        else:
            print(f"left out: there is no {row.checkpoint} yet")
            continue
        print_row(results[name])
        save_strip(folder / name)
        print("\n".join(moved(results[name], stored.get(name))))
        write(folder / "results.json", results)
        checkpoint.write_whole(folder / "table.md", table(results, "").encode())
    print(f"\n{folder}/table.md, results.json, and a folder for each row")
    if store:
        keep(results, folder)


def choose(rows: list[str] | None) -> dict[str, Row | None]:
    """The rows by name; None is the row of real images."""
    known = {**ROWS, REAL: None}
    for name in rows or []:
        if name not in known:
            raise UserError(f"row {name} is not known: take some of {', '.join(known)}")
    return {name: known[name] for name in rows or known}


def kept(task: Task, folder: Path) -> dict[str, Any] | None:
    """What an earlier run of the same checkpoint and flags measured, if there is one."""
    result = read(folder / "result.json")
    wanted = task.settings()
    same = bool(result) and all(result.get(key) == value for key, value in wanted.items())
    if same:
        print(f"as measured before, at commit {result['commit'][:12]}; --fresh true measures anew")
    return result if same else None


def real_row(reference: Reference, count: int, folder: Path) -> dict[str, Any]:
    """Training images in place of samples: the figures of a perfect network."""
    checkpoint.make_folder(folder)
    levels = reference.data.train[:64]
    torch.save({"batches": [levels]}, folder / "samples.pt")
    real = reference.real(count)
    rest = {"num_steps": None, "bits_per_dim": None, "seconds_per_sample": None}
    result = {**real, "num_samples": count, "real": real, **rest, **surroundings(reference)}
    write(folder / "result.json", result)
    return result


def save_strip(folder: Path) -> None:
    """The first ten samples, for the table."""
    levels = torch.load(folder / "samples.pt", weights_only=True)["batches"][0][:10]
    save_grid(folder / "strip.png", from_uint8(levels), columns=10, scale=1)


def moved(result: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    """A line for each figure that is not as stored."""
    if before is None:
        return ["nothing is stored to compare it with"]
    lines = []
    if result.get("checkpoint_sha256") != before.get("checkpoint_sha256"):
        lines.append("the checkpoint is another one than that of the stored figures")
    if result["num_samples"] != before["num_samples"]:
        return [*lines, f"not compared: the stored figures are of {before['num_samples']} samples"]
    for name, tolerance in TOLERANCE.items():
        new, old = figure(result, name), figure(before, name)
        if new is None or old is None:
            continue
        if abs(new - old) > tolerance * abs(old):
            change = f", {100 * (new / old - 1):+.1f} %" if old else ""
            lines.append(f"moved: {name} from {old:.4g} to {new:.4g}{change}")
    return lines or ["as stored"]


def figure(result: Mapping[str, Any], name: str) -> float | None:
    value = result[name]
    return value["total"]["mean"] if isinstance(value, dict) else value


def table(results: Mapping[str, Mapping[str, Any]], pictures: str) -> str:
    """Markdown, a line a row; pictures is where their folders, or files, stand."""
    lines: list[str] = []
    for name, result in results.items():
        row = ROWS.get(name)
        source = f"{pictures}/{name}.png" if pictures else f"{name}/strip.png"
        model = row.model if row else "real training images"
        cells = {"model": model, "": f"![ten samples]({source})", **columns(result)}
        if not lines:
            lines = ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
        lines.append("| " + " | ".join(cells.values()) + " |")
    left_out = [name for name in ROWS if name not in results]
    if left_out:
        lines += ["", f"Not measured: {', '.join(left_out)}."]
    return "\n".join(lines) + "\n"


def keep(results: dict[str, Any], folder: Path) -> None:
    """Into the repository: the figures, the pictures, and the table in the README."""
    checkpoint.make_folder(STORED)
    merged = read(STORED / "results.json") | results
    merged = {name: merged[name] for name in [*ROWS, REAL] if name in merged}
    write(STORED / "results.json", merged)
    for name in results:
        shutil.copy(folder / name / "strip.png", STORED / f"{name}.png")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, found, rest = text.partition(MARKERS[0])
    _, ended, after = rest.partition(MARKERS[1])
    if not (found and ended):
        raise UserError(f"{readme} has no lines {MARKERS[0]} and {MARKERS[1]} for the table")
    whole = f"{before}{MARKERS[0]}\n{table(merged, 'benchmarks/scoreboard')}{MARKERS[1]}{after}"
    checkpoint.write_whole(readme, whole.encode())
    print(f"stored in {STORED} and in {readme}")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def write(file: Path, content: Mapping[str, Any]) -> None:
    checkpoint.write_whole(file, (json.dumps(content, indent=2) + "\n").encode())


if __name__ == "__main__":
    cli.run(main)
