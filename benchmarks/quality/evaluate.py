"""Measure the samples of a checkpoint and its bound, in a way that anyone can repeat.

Samples are compared with the test images of the data, in the features of a small classifier. The
same metrics of as many training images show what a perfect network would reach.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality import classifier, metrics
from benchmarks.quality.metrics import (
    NUM_FEATURES,
    SURE,
    Reference,
    check_count,
    inception_fid,
    nearest,
    share_error,
)
from benchmarks.quality.samples import PlanOptions, SamplePlan, draw
from benchmarks.records import environment, write_json
from common import cli
from common.data import from_uint8, load_images_for
from common.device import autocast, forked_rng
from common.errors import UserError, check_at_least
from common.files import ROOT, make_folder, output_folder
from common.pictures import save_grid
from common.sampling import BATCH_SIZE, check_finite

import torch
from torch import Tensor
from tqdm import tqdm


def main(
    model_checkpoint: str,
    num_images: int = 1000,
    num_terms: int = 50,
    data_dir: str | None = None,
    sha256: str | None = None,
    inception: bool = False,
    options: PlanOptions = PlanOptions(),
) -> None:
    """Measure a checkpoint of any lesson: result.json, samples.png and nearest.png, in
    output/evaluation_SAMPLER_STEPS of the lesson's folder (with η or the variance, if given, in the
    name), or in --output_dir. FID and what else needs the classifier is for 28x28 digits only; for
    other data there is the rest.

    An interrupted run resumes after the last saved samples. --precision applies to sampling; all
    else is computed in float32.

    Args:
        model_checkpoint: a file, or an http(s) address.
        num_images: test images for bits per dimension, with ddpm and strided; 0 for none.
        num_terms: terms of the bound drawn for each image.
        data_dir: folder of the data, in torchvision's layout or your own; else $DIFFUSION_DATA,
            else data/.
        sha256: refuse a file with another sum.
        inception: also measure FID against the training images in Inception's features, as papers
            do for photographs; needs `pip install 'torchmetrics[image]'` and its download.
    """
    check_numbers(options.num_samples, num_images, num_terms)
    if inception:
        metrics.inception()
    plan = SamplePlan(model_checkpoint, options, sha256)
    data = load_images_for(plan.content, plan.content.dataset, data_dir)
    if plan.conditional and len(data.classes) != len(plan.classes):
        raise UserError(f"{data} has {len(data.classes)} classes, not {len(plan.classes)}")
    reference = Reference(data, plan.device)
    evaluation = Evaluation(plan, reference, num_images, num_terms, inception)
    default = str(ROOT.joinpath(*plan.lesson.split("."), "output", f"evaluation_{plan.name}"))
    chosen = default if options.output_dir is None else options.output_dir
    folder = output_folder(chosen, plan.lesson)
    print_row(evaluation.run(folder))
    print(f"{folder}/result.json, samples.png, nearest.png")


def check_numbers(num_samples: int | None, num_images: int, num_terms: int) -> None:
    """Refuse from the flags alone what could not be measured in the end."""
    check_at_least(0, num_images=num_images)
    if num_images == 1:
        raise UserError("num_images is 1: it must be 0, or at least 2")
    check_at_least(2, num_terms=num_terms)
    if num_samples is not None:
        check_count(num_samples, NUM_FEATURES)


@dataclass
class Evaluation:
    """A measurement of a checkpoint.

    Args:
        plan: how its samples are drawn.
        reference: the real images to compare them with.
        num_images: test images for the bound; 0 for none.
        num_terms: terms of the bound drawn for each image.
        inception: whether to measure FID in the features of Inception, too.
    """

    plan: SamplePlan
    reference: Reference
    num_images: int
    num_terms: int
    inception: bool = False

    def __post_init__(self) -> None:
        check_numbers(self.plan.num_samples, self.num_images, self.num_terms)

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on, except the code and the machine."""
        bound = {"num_images": self.num_images, "num_terms": self.num_terms}
        return {**self.plan.settings(), **bound, "dataset": self.reference.data.name}

    def run(self, folder: Path) -> dict[str, Any]:
        """Measure; write the result and the pictures into the folder."""
        plan, reference = self.plan, self.reference
        real = reference.real(plan.num_samples, balanced=plan.conditional)
        make_folder(folder)
        levels, seconds = draw(plan, folder / "samples.npz")
        digits = torch.arange(len(levels)) % len(plan.classes) if plan.conditional else None
        distance, index = nearest(levels, reference.data.train)
        content, device, train = plan.content, plan.device, reference.data.train
        batch_size = content.config.get("batch_size")  # not known of published networks
        result = {
            **self.settings(),
            "network_calls": plan.network_calls,
            **reference.compare(levels, digits),
            "inception_fid": inception_fid(levels, train, device) if self.inception else None,
            "nearest_median": distance.median().item(),
            "nearest_least": distance.min().item(),
            "real": real,
            "bits_per_dim": self.bits_per_dim(),
            "seconds_per_sample": seconds / len(levels),
            "training_steps": content.step,
            "training_images": batch_size and content.step * batch_size,
            "parameters": sum(p.numel() for p in plan.model.parameters()),
            **setup(reference),
        }
        closest = distance.argsort()[:8]
        pairs = torch.cat([levels[closest], reference.data.train[index[closest]]])
        save_grid(folder / "samples.png", from_uint8(levels[:64]))
        save_grid(folder / "nearest.png", from_uint8(pairs))
        write_json(folder / "result.json", result)
        return result

    @torch.no_grad()
    def bits_per_dim(self) -> dict[str, Any] | None:
        """Bits per dimension of test images, and its parts. None for DDIM, which has no
        p(x_{t-1} | xt) and so no bound, and for guided networks."""
        plan, reference = self.plan, self.reference
        if self.num_images == 0 or plan.sampler == "ddim" or plan.guidance != 1:
            return None
        if len(reference.test) < 2:
            return None  # no standard error
        levels = reference.test[: self.num_images].to(plan.device)
        labels = reference.labels[: self.num_images]
        parts: list[dict[str, Tensor]] = []
        with forked_rng(plan.device, plan.seed), autocast(plan.device, "float32"):
            batches = zip(levels.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
            bar = tqdm(list(batches), unit="batch", desc="bits/dim", disable=None)
            for k, (batch, digits) in enumerate(bar):
                images = from_uint8(batch)
                parts.append(plan.bits_per_dim(images, digits, k, self.num_terms))
                check_finite(parts[-1]["total"])
        summary: dict[str, Any] = {}
        for name in parts[0]:
            values = torch.cat([part[name] for part in parts]).cpu().double()
            error = values.std().item() / len(values) ** 0.5
            summary[name] = {"mean": values.mean().item(), "standard_error": error}
        num_terms = min(self.num_terms, plan.process.num_timesteps)
        return {**summary, "num_images": len(levels), "num_terms": num_terms}


def setup(reference: Reference) -> dict[str, Any]:
    """What else is needed to repeat the measurement."""
    return {
        "reference": f"{len(reference.test):,} test images",
        "classifier_sha256": classifier.SHA256 if reference.model else None,
        "classifier_accuracy": reference.accuracy,
        "judge_accuracy": reference.judge_accuracy,
        "sure_from": SURE,
        **environment(reference.device, "torch", "torchvision", "torchmetrics"),
    }


def columns(result: Mapping[str, Any]) -> dict[str, str]:
    """The cells of the result's row, each with its standard error where it has one."""
    real, bits, count = result["real"], result["bits_per_dim"], result["num_samples"]
    shares = {
        name: "" if result[key] is None else share(result[key], count, scale)
        for name, (key, scale) in SHARES.items()
    }
    fid, error, floor = result["fid"], result["fid_error"], real_error(real)
    ratio = fid and fid / real["fid"]
    both = fid and ratio * math.hypot(error / fid, (floor or 0) / real["fid"])
    return {
        "network calls": cell(result["network_calls"], ","),
        "samples": cell(count, ","),
        "FID": plus_minus(fid, error),
        "real": plus_minus(real["fid"], floor),
        "ratio": plus_minus(ratio, both),
        **shares,
        "balance": cell(result["class_balance_bits"], ".3f"),
        "nearest": cell(result["nearest_median"], ".1f"),
        "bits/dim": plus_minus(*bits["total"].values()) if bits else "",
    }


SHARES = {  # and whether in per cent
    "sure": ("share_sure", 100),
    "as asked": ("agreement", 100),
    "precision": ("precision", 1),
    "recall": ("recall", 1),
    "typical": ("judge_typical", 100),
}


def share(value: float, count: int, scale: int) -> str:
    text = plus_minus(scale * value, scale * share_error(value, count))
    return f"{text} %" if scale == 100 else text


def real_error(real: Mapping[str, Any]) -> float | None:
    """Standard error of the mean FID of several sets of real images."""
    return real["fid_deviation"] and real["fid_deviation"] / real["draws"] ** 0.5


def plus_minus(value: float | None, error: float | None) -> str:
    """The value and its error, to one digit of the error, or two if the first is a 1."""
    if value is None or error is None or error == 0:
        return cell(value, ".3g")
    exponent = math.floor(math.log10(error))
    digits = max(0, -exponent + (error < 2 * 10**exponent))
    return f"{value:,.{digits}f} ± {error:.{digits}f}"


def cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def print_row(result: Mapping[str, Any]) -> None:
    row = columns(result)
    width = {name: max(len(name), len(text)) for name, text in row.items()}
    print("  ".join(name.rjust(width[name]) for name in row))
    print("  ".join(text.rjust(width[name]) for name, text in row.items()))


if __name__ == "__main__":
    cli.run(main, resumes=True)
