"""Sample a trained DDPM by Algorithm 2 of Ho et al. 2020."""

from functools import partial
from pathlib import Path

from common import checkpoint, cli
from common.data import from_uint8
from common.options import SamplingOptions
from common.pictures import save_grid
from common.sampling import draw_samples, inference, save_samples
from lesson_05.ddpm import DDPM, Variance, linear_beta
from lesson_05.options import DDPMOptions
from lesson_05.unet import UNet

import torch
from torch import Tensor

SHIPPED = str(Path(__file__).parent / "pretrained" / "mnist.safetensors")


def main(
    clip_x0: bool = True,
    variance: Variance | None = None,
    options: SamplingOptions = SamplingOptions(model_checkpoint=SHIPPED),
) -> None:
    """Sample images from a checkpoint of this lesson [Ho20 Algorithm 2]: digits, and photographs
    with the weights that `python -m common.import_weights` converts.

    Args:
        clip_x0: whether each prediction of the clean image is clipped to [-1, 1].
        variance: variance of the reverse steps; as in training unless given.
    """
    process, model, content = load(options.model_checkpoint, options.sha256, variance)
    T = process.num_timesteps
    with inference(options, "lesson_05") as (folder, device):
        trajectory = partial(process.to(device).trajectory, model.to(device), clip_x0=clip_x0)
        samples = draw_samples(
            trajectory,
            options.num_samples,
            content.image_shape,
            T,
            device,
            picture=folder / "samples.png",
        )
    save_samples(folder, samples, options)
    print(f"{options.num_samples} samples: {folder}/samples.png, reverse.gif, reverse.png")


def load(
    source: str, sha256: str | None = None, variance: Variance | None = None
) -> tuple[DDPM, UNet, checkpoint.Checkpoint]:
    """Load the process and the averaged network, in eval mode, from a checkpoint."""
    content = checkpoint.load(source, "lesson_05", sha256)
    with content.must_fit():
        config = content.arguments(DDPMOptions)
        beta = linear_beta(config["num_timesteps"], config["beta_1"], config["beta_T"])
        kind = config.get("prediction", "eps"), config.get("loss", "simple")
        process = DDPM(beta, variance or config["variance"], *kind)
        model = content.build(lambda: UNet(**content.arguments(UNet, "network")))
    return process, model, content


def save_forward(path: Path, process: DDPM, levels: Tensor) -> None:
    """Save real images as they become noise: one row per image, from x0 to xT [Ho20 Figure 2]."""
    x0 = from_uint8(levels).to(process.device)
    eps = torch.randn_like(x0)
    times = torch.linspace(0, process.num_timesteps, 11).round().long().to(x0.device)
    strip = torch.stack([process.q_sample(x0, t.expand(len(x0)), eps) for t in times], 1)
    save_grid(path, strip.flatten(0, 1), columns=len(times))


if __name__ == "__main__":
    cli.run(main)
