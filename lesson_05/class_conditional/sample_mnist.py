"""Sample images of given classes, by Algorithm 2 of Ho et al. 2020."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import checkpoint, cli
from common.errors import UserError, check_at_least
from common.options import SamplingOptions
from common.sampling import draw_samples, inference, save_samples
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.ddpm import DDPM, Variance, linear_beta
from lesson_05.guidance import one_per_sample
from lesson_05.options import ConditionalOptions
from lesson_05.unet import UNet

import torch
from torch import Tensor

SHIPPED = str(Path(__file__).parent / "pretrained" / "mnist.safetensors")


def main(
    labels: list[str] | None = None,
    guidance: float = 1.0,
    clip_x0: bool = True,
    variance: Variance | None = None,
    options: SamplingOptions = SamplingOptions(model_checkpoint=SHIPPED),
) -> None:
    """Sample images of given classes.

    Writes samples.png, and labels.txt with the labels in the same rows of eight.

    Args:
        labels: names or numbers of classes, repeated in order up to num_samples; all the classes
            unless given.
        guidance: scale of classifier-free guidance; 1 is conditional sampling, 0 unconditional.
        clip_x0: whether each prediction of the clean image is clipped to [-1, 1].
        variance: variance of the reverse steps; as in training unless given.
    """
    check_at_least(0, guidance=guidance)
    process, model, content = load(options.model_checkpoint, options.sha256, variance)
    num_samples = options.num_samples
    if labels is None:
        labels = model.classes[:num_samples]
    names = one_per_sample(labels, num_samples, "labels")
    label = torch.tensor([label_of(name, model.classes) for name in names])
    with inference(options, "lesson_05.class_conditional") as (folder, device):
        process, model = process.to(device), model.to(device)

        def trajectory(x_T: Tensor, label: Tensor) -> Iterator[tuple[int, Tensor]]:
            return process.trajectory(model.bind(label, guidance), x_T, clip_x0)

        shape, T = content.image_shape, process.num_timesteps
        samples = draw_samples(trajectory, num_samples, shape, T, device, label)
    save_samples(folder, samples, options)
    save_labels(folder / "labels.txt", [model.classes[k] for k in label])
    print(f"{num_samples} samples: {folder}/samples.png, their labels: {folder}/labels.txt")


def load(
    source: str, sha256: str | None = None, variance: Variance | None = None
) -> tuple[DDPM, ClassConditionalUNet, checkpoint.Checkpoint]:
    """Load the process and the averaged network, in eval mode, from a checkpoint."""
    content = checkpoint.load(source, "lesson_05.class_conditional", sha256)
    with content.must_fit():
        config = content.arguments(ConditionalOptions)
        beta = linear_beta(config["num_timesteps"], config["beta_1"], config["beta_T"])
        process = DDPM(beta, variance or config["variance"])
        num_classes = content.arguments(ClassConditionalUNet)["num_classes"]
        network = content.arguments(UNet, "network")
        model = content.build(lambda: ClassConditionalUNet(num_classes, **network))
        model.classes = content.classes or model.classes
        if len(model.classes) != num_classes:
            raise UserError(f"it has {num_classes} classes, but names {len(model.classes)}")
    return process, model, content


def label_of(name: str, classes: Sequence[str]) -> int:
    """The label of the class of that name or, if no class has it, of that number."""
    numbers = [str(label) for label in range(len(classes))]
    for names in (classes, numbers):
        if str(name) in names:
            return list(names).index(str(name))
    known = textwrap.shorten(", ".join(classes), 80, placeholder=" ...")
    raise UserError(f"label {str(name)[:40]} is not known: choose from {known}")


def save_labels(path: Path, names: Sequence[str]) -> None:
    """Save the classes' names in the layout of the image grid, eight in a row."""
    width = max(map(len, names))
    rows = [
        " ".join(name.ljust(width) for name in names[i : i + 8]) for i in range(0, len(names), 8)
    ]
    path.write_text("".join(f"{row.rstrip()}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
