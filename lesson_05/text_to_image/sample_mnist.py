"""Sample what prompts ask for, by Algorithm 2 of Ho et al. 2020."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import checkpoint, cli
from common.device import Precision, autocast, pick_device
from common.images import save_grid
from common.images import save_npz as write_npz
from lesson_05.ddpm import DDPM, Variance, linear_beta
from lesson_05.guidance import in_turn, sample_each
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.text import TextEncoder, digit_prompts, tokenize

SHIPPED = str(Path(__file__).parents[2] / "lesson_06" / "pretrained" / "text_to_image.pt")


def main(
    model_checkpoint: str = SHIPPED,
    prompts: list[str] | None = None,
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
    """Sample images of what the prompts say: samples.png, and prompts.txt in the same layout.

    Args:
        model_checkpoint: a file, or an http(s) address; lesson 6's unless given.
        prompts: one or more, repeated in turn where there are more samples; else drawn at random.
        guidance: scale of classifier-free guidance; 1 is plain conditional, 0 unconditional.
        num_samples: how many images.
        clip_x0: whether each estimate of the clean image is clipped to [-1, 1].
        variance: of the reverse steps; as in training unless given.
        save_npz: also write samples.npz: key samples, uint8 (N, C, H, W).
        output_dir: folder of the pictures; output/ in this folder unless given.
        seed: of the noise and of prompts drawn at random.
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
        x0 = save_prompted(
            process, model, shape, prompts, num_samples, guidance, folder, clip_x0, seed
        )
    if save_npz:
        write_npz(folder / "samples.npz", x0)
    print(f"{num_samples} samples: {folder}/samples.png, of what {folder}/prompts.txt asks")


def load(
    source: str, variance: Variance | None = None, sha256: str | None = None
) -> tuple[DDPM, TextToImageUNet, checkpoint.Checkpoint]:
    """The process and the averaged network, in eval mode, from a checkpoint alone."""
    content = checkpoint.load(source, "lesson_05.text_to_image", sha256)
    config = content["config"]
    with checkpoint.must_fit(source):
        beta = linear_beta(config["num_timesteps"], config["beta_1"], config["beta_T"])
        process = DDPM(beta, variance or config["variance"])
        model = TextToImageUNet(TextEncoder(**config["text"]), **config["network"])
        model = checkpoint.load_weights(model, content)
    return process, model, content


def conditions(digits: list[int], seed: int) -> Tensor:
    """What model.bind takes to be asked for these digits, each in words drawn at random: for
    common/evaluate.py."""
    draw = random.Random(seed)
    return tokenize([draw.choice(digit_prompts(digit)) for digit in digits])


def save_prompted(
    process: DDPM,
    model: TextToImageUNet,
    shape: tuple[int, int, int],
    prompts: Sequence[str] | None,
    num_samples: int,
    guidance: float,
    folder: Path,
    clip_x0: bool = True,
    seed: int = 0,
) -> Tensor:
    """Draw one sample a prompt and write the grid and the prompts, in the same rows of eight."""
    prompts = in_turn(
        random_prompts(num_samples, seed) if prompts is None else prompts, num_samples, "prompts"
    )
    x0 = sample_each(
        process, lambda tokens: model.bind(tokens, guidance), tokenize(prompts), shape, clip_x0
    )
    save_grid(folder / "samples.png", x0)
    save_prompts(folder / "prompts.txt", prompts)
    return x0


def random_prompts(count: int, seed: int) -> list[str]:
    """Templates and digits drawn at random."""
    draw = random.Random(seed)
    return [draw.choice(digit_prompts(draw.randrange(10))) for _ in range(count)]


def save_prompts(path: Path, prompts: Sequence[str], columns: int = 8) -> None:
    """The prompts in the layout of their grid: a row a line, side by side."""
    width = max(map(len, prompts)) + 2
    rows = [prompts[i : i + columns] for i in range(0, len(prompts), columns)]
    lines = ["".join(" ".join(p.split()).ljust(width) for p in row).rstrip() for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    cli.run(main)
