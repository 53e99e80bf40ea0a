"""Sample a trained Improved DDPM, in all its steps or in a few, as pictures and as an array."""

from functools import partial
from pathlib import Path

from common import checkpoint, cli
from common.data import from_uint8
from common.errors import UserError
from common.options import SamplingOptions
from common.pictures import save_grid
from common.sampling import draw_samples, inference, save_samples
from lesson_09.iddpm import ImprovedDDPM, Variance, named_beta
from lesson_09.options import IDDPMOptions
from lesson_09.unet import UNet

import torch
from torch import Tensor

SHIPPED = str(Path(__file__).parent / "pretrained" / "mnist.safetensors")


def main(
    num_steps: int | None = None,
    clip_x0: bool = True,
    variance: Variance | None = None,
    options: SamplingOptions = SamplingOptions(model_checkpoint=SHIPPED),
) -> None:
    """Sample images from a checkpoint of this lesson [Nichol21 Section 4]: digits, and photographs
    with the weights that `python -m common.import_weights` converts.

    Args:
        num_steps: S, the number of sampling steps, spread evenly over the T steps of training; all
            T unless given.
        clip_x0: whether each prediction of the clean image is clipped to [-1, 1].
        variance: variance of the reverse steps; as in training unless given.
    """
    process, model, content = load(options.model_checkpoint, options.sha256, variance)
    process = process if num_steps is None else process.strided(num_steps)
    S = process.num_timesteps
    with inference(options, "lesson_09") as (folder, device):
        trajectory = partial(process.to(device).trajectory, model.to(device), clip_x0=clip_x0)
        samples = draw_samples(
            trajectory,
            options.num_samples,
            content.image_shape,
            S,
            device,
            picture=folder / "samples.png",
        )
    save_samples(folder, samples, options)
    files = f"{folder}/samples.png, reverse.gif, reverse.png"
    print(f"{options.num_samples} samples in {S} steps: {files}")


def load(
    source: str, sha256: str | None = None, variance: Variance | None = None
) -> tuple[ImprovedDDPM, UNet, checkpoint.Checkpoint]:
    """Load the process and the averaged network, in eval mode, from a checkpoint."""
    content = checkpoint.load(source, "lesson_09", sha256)
    with content.must_fit():
        config = content.arguments(IDDPMOptions)
        beta = named_beta(config["schedule"], config["num_timesteps"])
        weights = config["simple_weight"], config["vlb_weight"]
        process = ImprovedDDPM(beta, variance or config["variance"], *weights)
        model = content.build(lambda: UNet(**content.arguments(UNet, "network")))
        learned = config["network"]["learned_variance"]
    if variance == "learned" and not learned:
        raise UserError(
            f"{source} was trained without learned variance: use --variance beta or beta_tilde"
        )
    return process, model, content


def save_forward(path: Path, process: ImprovedDDPM, levels: Tensor) -> None:
    """Real images becoming noise: a row each, from x0 to xT [Nichol21 Figure 3]."""
    x0 = from_uint8(levels).to(process.device)
    eps = torch.randn_like(x0)
    times = torch.linspace(0, process.num_timesteps, 11).round().long().to(x0.device)
    strip = torch.stack([process.q_sample(x0, t.expand(len(x0)), eps) for t in times], 1)
    save_grid(path, strip.flatten(0, 1), columns=len(times))


if __name__ == "__main__":
    cli.run(main)
