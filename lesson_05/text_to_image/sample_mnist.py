"""Sample images from text prompts by Algorithm 2 of Ho et al. 2020."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import checkpoint, cli
from common.errors import check_at_least
from common.options import SamplingOptions
from common.sampling import draw_samples, inference, save_samples
from lesson_05.ddpm import DDPM, Variance, linear_beta
from lesson_05.guidance import one_per_sample
from lesson_05.options import TextToImageOptions
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.text import TextEncoder, class_prompts, tokenize
from lesson_05.unet import UNet

from torch import Tensor

SHIPPED = str(Path(__file__).parents[2] / "lesson_06" / "pretrained" / "text_to_image.safetensors")


def main(
    prompts: list[str] | None = None,
    guidance: float = 1.0,
    clip_x0: bool = True,
    variance: Variance | None = None,
    options: SamplingOptions = SamplingOptions(model_checkpoint=SHIPPED),
) -> None:
    """Sample images from text prompts.

    Writes samples.png, and prompts.txt with the prompts in the same rows of eight.

    Args:
        prompts: one or more, repeated in order up to num_samples; drawn at random unless given.
        guidance: scale of classifier-free guidance; 1 is conditional sampling, 0 unconditional.
        clip_x0: whether each prediction of the clean image is clipped to [-1, 1].
        variance: variance of the reverse steps; as in training unless given.
    """
    check_at_least(0, guidance=guidance)
    process, model, content = load(options.model_checkpoint, options.sha256, variance)
    num_samples = options.num_samples
    if prompts is None:
        prompts = random_prompts(num_samples, options.seed, model.classes)
    prompts = one_per_sample(prompts, num_samples, "prompts")
    tokens = tokenize(prompts)
    with inference(options, "lesson_05.text_to_image") as (folder, device):
        process, model = process.to(device), model.to(device)

        def trajectory(x_T: Tensor, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
            return process.trajectory(model.bind(tokens, guidance), x_T, clip_x0)

        shape, T = content.image_shape, process.num_timesteps
        samples = draw_samples(trajectory, num_samples, shape, T, device, tokens)
    save_samples(folder, samples, options)
    save_prompts(folder / "prompts.txt", prompts)
    print(f"{num_samples} samples: {folder}/samples.png, their prompts: {folder}/prompts.txt")


def load(
    source: str, sha256: str | None = None, variance: Variance | None = None
) -> tuple[DDPM, TextToImageUNet, checkpoint.Checkpoint]:
    """Load the process and the averaged network, in eval mode, from a checkpoint."""
    content = checkpoint.load(source, "lesson_05.text_to_image", sha256)
    with content.must_fit():
        config = content.arguments(TextToImageOptions)
        beta = linear_beta(config["num_timesteps"], config["beta_1"], config["beta_T"])
        process = DDPM(beta, variance or config["variance"])
        text = content.arguments(TextEncoder, "text")
        network = content.arguments(UNet, "network")
        model = content.build(lambda: TextToImageUNet(TextEncoder(**text), **network))
        model.classes = content.classes or model.classes
    return process, model, content


def random_prompts(count: int, seed: int, classes: Sequence[str]) -> list[str]:
    """Prompts for random classes, from random templates."""
    draw, prompts = random.Random(seed), class_prompts(classes)
    return [draw.choice(prompts[draw.randrange(len(prompts))]) for _ in range(count)]


def save_prompts(path: Path, prompts: Sequence[str], columns: int = 8) -> None:
    """Save the prompts in the layout of the image grid."""
    width = max(map(len, prompts)) + 2
    rows = [prompts[i : i + columns] for i in range(0, len(prompts), columns)]
    lines = ["".join(" ".join(p.split()).ljust(width) for p in row).rstrip() for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    cli.run(main)
