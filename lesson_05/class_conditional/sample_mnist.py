"""Sample images of given classes, by Algorithm 2 of Ho et al. 2020."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import checkpoint, cli
from common.errors import UserError, check_at_least
from common.options import SamplingOptions
from common.sampling import draw_samples, inference, save_samples
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.ddpm import DDPM, Variance, linear_beta
from lesson_05.guidance import one_per_sample
from lesson_05.options import ConditionalOptions
from lesson_05.unet import UNet

SHIPPED = str(Path(__file__).parent / "pretrained" / "mnist.safetensors")


def main(
    labels: list[int] | None = None,
    guidance: float = 1.0,
    clip_x0: bool = True,
    variance: Variance | None = None,
    options: SamplingOptions = SamplingOptions(model_checkpoint=SHIPPED),
) -> None:
    """Sample images of given classes.

    Writes samples.png, and labels.txt with the labels in the same rows of eight.

    Args:
        labels: one or more, repeated in order up to num_samples; all the classes unless given.
        guidance: scale of classifier-free guidance; 1 is conditional sampling, 0 unconditional.
        clip_x0: whether each prediction of the clean image is clipped to [-1, 1].
        variance: variance of the reverse steps; as in training unless given.
    """
    check_at_least(0, guidance=guidance)
    process, model, content = load(options.model_checkpoint, options.sha256, variance)
    num_samples = options.num_samples
    if labels is None:
        labels = list(range(model.num_classes))[:num_samples]
    labels = one_per_sample(labels, num_samples, "labels")
    for label in labels:
        if not 0 <= label < model.num_classes:
            raise UserError(f"label {label} is not known: choose 0 to {model.num_classes - 1}")
    with inference(options, "lesson_05.class_conditional") as (folder, device):
        process, model = process.to(device), model.to(device)

        def trajectory(x_T: Tensor, label: Tensor) -> Iterator[tuple[int, Tensor]]:
            return process.trajectory(model.bind(label, guidance), x_T, clip_x0)

        shape, T = content.image_shape, process.num_timesteps
        samples = draw_samples(trajectory, num_samples, shape, T, device, torch.tensor(labels))
    save_samples(folder, samples, options)
    save_labels(folder / "labels.txt", labels)
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
    return process, model, content


def save_labels(path: Path, labels: Sequence[int]) -> None:
    """Save the labels in the layout of the image grid, eight in a row."""
    rows = [labels[i : i + 8] for i in range(0, len(labels), 8)]
    path.write_text("\n".join(" ".join(map(str, row)) for row in rows) + "\n")


if __name__ == "__main__":
    cli.run(main)
