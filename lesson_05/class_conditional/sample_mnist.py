"""Sample images of given classes, by Algorithm 2 of Ho et al. 2020."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import checkpoint, cli
from common.device import Precision, autocast, pick_device
from common.errors import UserError
from common.images import save_grid
from common.images import save_npz as write_npz
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.ddpm import DDPM, Variance, linear_beta
from lesson_05.guidance import in_turn, sample_each

SHIPPED = str(Path(__file__).parent / "pretrained" / "mnist.pt")


def main(
    model_checkpoint: str = SHIPPED,
    labels: list[int] | None = None,
    guidance: float = 1.0,
    num_samples: int = 64,
    clip_x0: bool = True,
    variance: Variance | None = None,
    save_npz: bool = False,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    sha256: str | None = None,
) -> None:
    """Sample images of the classes asked for: samples.png, and labels.txt in the same layout.

    Args:
        model_checkpoint: a file, or an http(s) address; the shipped one unless given.
        labels: one or more, repeated in turn where there are more samples; else all the classes.
        guidance: scale of classifier-free guidance; 1 is plain conditional, 0 unconditional.
        num_samples: how many images.
        clip_x0: whether each estimate of the clean image is clipped to [-1, 1].
        variance: of the reverse steps; as in training unless given.
        save_npz: also write samples.npz: key samples, uint8 (N, C, H, W).
        output_dir: folder of the pictures; output/ in this folder unless given.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
        sha256: refuse a file with another sum.
    """
    place = pick_device(device)
    process, model, content = load(model_checkpoint, variance, sha256)
    network = content["config"]["network"]
    shape = (network["image_channels"], network["image_size"], network["image_size"])
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)
    process, model = process.to(place), model.to(place)
    torch.manual_seed(seed)
    with autocast(place, precision):
        x0 = save_classes(process, model, shape, labels, num_samples, guidance, folder, clip_x0)
    if save_npz:
        write_npz(folder / "samples.npz", x0)
    print(f"{num_samples} samples: {folder}/samples.png, of the classes in {folder}/labels.txt")


def load(
    source: str, variance: Variance | None = None, sha256: str | None = None
) -> tuple[DDPM, ClassConditionalUNet, checkpoint.Checkpoint]:
    """The process and the averaged network, in eval mode, from a checkpoint alone."""
    content = checkpoint.load(source, "lesson_05.class_conditional", sha256)
    config = content["config"]
    with checkpoint.must_fit(source):
        beta = linear_beta(config["num_timesteps"], config["beta_1"], config["beta_T"])
        process = DDPM(beta, variance or config["variance"])
        model = ClassConditionalUNet(config["num_classes"], **config["network"])
        model = checkpoint.load_weights(model, content)
    return process, model, content


def conditions(digits: list[int], seed: int) -> Tensor:
    """What model.bind takes to be asked for these digits: for common/evaluate.py."""
    return torch.tensor(digits)


def save_classes(
    process: DDPM,
    model: ClassConditionalUNet,
    shape: tuple[int, int, int],
    labels: Sequence[int] | None,
    num_samples: int,
    guidance: float,
    folder: Path,
    clip_x0: bool = True,
) -> Tensor:
    """Draw one sample a label and write the grid and the labels, in the same rows of eight."""
    if labels is None:
        labels = [i % model.num_classes for i in range(num_samples)]
    labels = in_turn(labels, num_samples, "labels")
    for label in labels:
        if not 0 <= label < model.num_classes:
            raise UserError(f"label {label} is not known: take 0 to {model.num_classes - 1}")
    x0 = sample_each(
        process, lambda chunk: model.bind(chunk, guidance), torch.tensor(labels), shape, clip_x0
    )
    save_grid(folder / "samples.png", x0)
    rows = [labels[i : i + 8] for i in range(0, num_samples, 8)]
    (folder / "labels.txt").write_text("\n".join(" ".join(map(str, row)) for row in rows) + "\n")
    return x0


if __name__ == "__main__":
    cli.run(main)
