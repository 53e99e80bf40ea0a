"""Train lesson 5's text-to-image network, with previews and samples by DDIM.

The training is lesson 5's, line for line, and so are the checkpoints: for every η DDIM's objective
is DDPM's up to the weights γ_t > 0, J_σ = Σ_t γ_t E‖ε - ε̂‖² + const [Song21 Theorem 1].
Differs: γ_t = 1, as in Ho20; the appendix has 1/(2 d σ_t² ᾱ_t), without the factor by which x0
enters the step. The authors draw the t of a batch in pairs, t and T + 1 - t; here they are drawn
independently.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cli
from lesson_05.ddpm import DDPM, Network
from lesson_05.options import TextToImageOptions
from lesson_05.text_to_image import train_mnist
from lesson_05.text_to_image.text import TextEncoder
from lesson_05.unet import UNet
from lesson_06.ddim import ddim_sample, ddim_timesteps, ddim_trajectory

from torch import Tensor


@dataclass
class Options(TextToImageOptions):
    """The flags of a DDPM with prompts, sampled by DDIM.

    Args:
        num_steps: S, the steps of previews and samples.
    """

    num_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        ddim_timesteps(self.num_timesteps, self.num_steps)  # refuses an impossible S
        self.output_dir = self.output_dir or str(Path(__file__).parent / "output")


def main(options: Options, network: dict[str, Any], text: dict[str, Any]) -> None:
    """Train a text-to-image DDPM [Ho20 Algorithm 1], and sample it by DDIM [Song21 Eq. 12]."""
    S = options.num_steps

    def preview(process: DDPM, model: Network, x_T: Tensor) -> Tensor:
        return ddim_sample(model, process, x_T, S)

    def trajectory(process: DDPM, model: Network, x_T: Tensor) -> Iterator[tuple[int, Tensor]]:
        return ddim_trajectory(model, process, x_T, S)

    script = str(Path(__file__).with_name("sample_ddim.py"))
    train_mnist.train(options, network, text, train_mnist.Sampler(preview, trajectory, S, script))


if __name__ == "__main__":
    cli.run(main, presets=True, network=UNet, text=TextEncoder)
