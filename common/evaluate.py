"""How good a checkpoint is: its samples and its bound, in figures that anyone can make again.

Samples are compared with the test images of the data, in the features of the small classifier
beside this file. What they would give if they were real is measured, too: on as many training
images.
"""

import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchmetrics
import torchvision
from torch import Tensor
from tqdm import tqdm

from common import checkpoint, classifier, cli, mnist
from common.device import Precision, autocast, hardware, pick_device
from common.images import from_uint8, save_grid
from common.metrics import SURE, Reference, check_count, nearest
from common.run import check
from common.subject import BATCH, ROOT, Sampler, Subject, all_samples, forked_rng, settings_of


def main(
    model_checkpoint: str,
    sampler: Sampler = "ddim",
    num_steps: int | None = None,
    num_samples: int | None = None,
    guidance: float = 1.0,
    num_images: int = 1000,
    num_terms: int = 50,
    data_dir: str | None = None,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    sha256: str | None = None,
) -> None:
    """Measure a checkpoint of any lesson: result.json, samples.png and nearest.png.

    Started again after it was stopped, it goes on with the samples that it has.

    Args:
        model_checkpoint: a file, or an http(s) address.
        sampler: ddpm takes all the steps that the network learned; ddim is lesson 6's; strided is
            lesson 9's.
        num_steps: of ddim and strided; 50 unless given.
        num_samples: how many images; 2,000 of at most 100 steps, else 500, unless given.
        guidance: scale of classifier-free guidance, where the network knows conditions.
        num_images: test images for bits per dimension, of ddpm and strided; 0 leaves it out.
        num_terms: of the bound, drawn for each image.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        output_dir: folder of the files; output/evaluation_... in the lesson's folder unless given.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic while sampling; auto is bfloat16 where the hardware
            has it. All else is float32.
        sha256: refuse a file with another sum.
    """
    place = pick_device(device)
    subject = Subject(model_checkpoint, sampler, num_steps, guidance, place, sha256)
    reference = Reference(mnist.load(subject.content["dataset"], data_dir), place)
    count = default_count(subject.steps) if num_samples is None else num_samples
    name = "_".join(["evaluation", sampler, str(subject.steps)])
    folder = Path(output_dir) if output_dir else subject.folder / "output" / name
    task = Task(subject, reference, count, num_images, num_terms, seed, precision)
    result = evaluate(task, folder)
    print_row(result)
    print(f"{folder}/result.json, samples.png, nearest.png")


def default_count(num_steps: int) -> int:
    return 2000 if num_steps <= 100 else 500


@dataclass
class Task:
    """What is to be measured."""

    subject: Subject
    reference: Reference
    num_samples: int
    num_images: int
    num_terms: int
    seed: int = 0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        check_count(self.num_samples, self.reference.model.num_features)
        check(lambda v: v == 0 or v >= 2, "0, or at least 2", num_images=self.num_images)
        check(lambda v: v >= 2, "at least 2", num_terms=self.num_terms)

    def settings(self) -> dict[str, Any]:
        """What the figures depend on, but for the code and the machine."""
        settings = settings_of(self.subject, self.num_samples, self.seed, self.precision)
        bounded = {"num_images": self.num_images, "num_terms": self.num_terms}
        return {**settings, **bounded, "dataset": self.reference.data.name}


def evaluate(task: Task, folder: Path) -> dict[str, Any]:
    """All the figures, as they are written to result.json in the folder."""
    subject, reference, count = task.subject, task.reference, task.num_samples
    real = reference.real(count, balanced=subject.conditional)
    checkpoint.make_folder(folder)
    settings = settings_of(subject, count, task.seed, task.precision)
    levels, seconds = all_samples(subject, settings, folder / "samples.pt")
    digits = torch.arange(count) % 10 if subject.conditional else None
    away, index = nearest(levels, reference.data.train)
    result = {
        **task.settings(),
        **reference.figures(levels, digits),
        "nearest_median": away.median().item(),
        "nearest_least": away.min().item(),
        "real": real,
        "bits_per_dim": bound(task),
        "seconds_per_sample": seconds / count,
        "training_steps": subject.content["step"],
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        **surroundings(reference),
    }
    closest = away.argsort()[:8]
    save_grid(folder / "samples.png", from_uint8(levels[:64]))
    pairs = torch.cat([levels[closest], reference.data.train[index[closest]]])
    save_grid(folder / "nearest.png", from_uint8(pairs))
    checkpoint.write_whole(folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    return result


def bound(task: Task) -> dict[str, Any] | None:
    """Bits per dimension of test images and what they are made of; None for a sampler that has no
    bound (DDIM's steps are no p(x_{t-1} | xt)), and for guided networks."""
    subject, reference = task.subject, task.reference
    if task.num_images == 0 or subject.sampler == "ddim" or subject.guidance != 1:
        return None
    levels = reference.test[: task.num_images].to(subject.device)
    labels = reference.labels[: task.num_images]
    T = subject.process.num_timesteps
    num_terms = min(task.num_terms, T)
    parts: list[dict[str, Tensor]] = []
    with forked_rng(subject.device), autocast(subject.device, "float32"):
        torch.manual_seed(task.seed)
        batches = list(zip(levels.split(BATCH), labels.split(BATCH), strict=True))
        for k, (batch, digits) in enumerate(tqdm(batches, unit="batch", desc="bits/dim")):
            network = subject.network(digits, k)
            parts.append(subject.bits_per_dim(network, from_uint8(batch), num_terms))
    whole = {name: torch.cat([part[name] for part in parts]).double() for name in parts[0]}
    summary = {
        name: {"mean": v.mean().item(), "standard_error": (v.std() / len(v) ** 0.5).item()}
        for name, v in whole.items()
    }
    return {**summary, "num_images": len(levels), "num_terms": num_terms}


def surroundings(reference: Reference) -> dict[str, Any]:
    """What else one needs to know to make the figures again."""
    return {
        "reference": f"{len(reference.test):,} test images",
        "classifier_sha256": classifier.SHA256,
        "classifier_accuracy": reference.accuracy,
        "sure_from": SURE,
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "torchmetrics": torchmetrics.__version__,
        },
        "hardware": hardware(reference.device),
    }


def commit() -> str:
    """Of the code that runs; with "-dirty" where files differ from it."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


def columns(result: Mapping[str, Any]) -> dict[str, str]:
    """One row of the table, as text."""
    real, bits = result["real"], result["bits_per_dim"]
    return {
        "steps": shown(result["num_steps"], ","),
        "samples": shown(result["num_samples"], ","),
        "FID": shown(result["fid"], ".3g"),
        "real": shown(real["fid"], ".3g"),
        "ratio": shown(result["fid"] / real["fid"], ".3g"),
        "FID of 500": shown(result["fid_500"], ".3g"),
        "sure": shown(result["share_sure"], ".1%"),
        "as asked": shown(result["agreement"], ".1%"),
        "balance": shown(result["class_balance_bits"], ".3f"),
        "precision": shown(result["precision"], ".2f"),
        "recall": shown(result["recall"], ".2f"),
        "nearest": shown(result["nearest_median"], ".1f"),
        "bits/dim": shown(bits and bits["total"]["mean"], ".2f"),
        "s/sample": shown(result["seconds_per_sample"], ".2g"),
    }


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def print_row(result: Mapping[str, Any]) -> None:
    row = columns(result)
    width = {name: max(len(name), len(text)) for name, text in row.items()}
    print("  ".join(name.rjust(width[name]) for name in row))
    print("  ".join(text.rjust(width[name]) for name, text in row.items()))


if __name__ == "__main__":
    cli.run(main)
