"""Interpolation between two images in latent space: Section 4.4 of Ho et al. 2020."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common import cli
from common.data import from_uint8, load_images_for
from common.errors import UserError
from common.options import CheckpointOptions, DataOptions
from common.pictures import save_grid
from common.sampling import check_finite, inference, last_images
from lesson_05.ddpm import DDPM, Network
from lesson_05.sample_mnist import SHIPPED, load

import torch
from torch import Tensor
from tqdm import tqdm


@dataclass
class Options(CheckpointOptions, DataOptions):
    """A trained network, and the test images to interpolate between."""

    model_checkpoint: str = SHIPPED


def main(
    first: int = 0,
    second: int = 1,
    times: list[int] | None = None,
    num_columns: int = 9,
    clip_x0: bool = True,
    options: Options = Options(),
) -> None:
    """Interpolate between two test images [Ho20 Section 4.4].

    Writes interpolation.png: one row for each t, from little noise to pure noise, with the two test
    images at its ends.

    Args:
        first: index of one test image, from 0.
        second: index of the other.
        times: t of each row, 1 to T; T/4, T/2, 3T/4 and T unless given.
        num_columns: interpolated images in a row, from λ = 0 to λ = 1.
        clip_x0: whether each prediction of the clean image is clipped to [-1, 1].
    """
    process, model, content = load(options.model_checkpoint, options.sha256)
    T = process.num_timesteps
    times = [max(1, T * k // 4) for k in (1, 2, 3, 4)] if times is None else times
    if not times or not all(1 <= t <= T for t in times) or num_columns < 2:
        raise UserError(
            f"times {times}, num_columns {num_columns}: choose times from 1 to {T}, and at "
            "least 2 columns"
        )
    data = load_images_for(content, options.dataset, options.data_dir)
    for number in (first, second):
        if not 0 <= number < len(data.test):
            raise UserError(f"there is no test image {number}: choose 0 to {len(data.test) - 1}")

    with inference(options, "lesson_05") as (folder, device):
        process, model = process.to(device), model.to(device)
        x0, x0_other = (from_uint8(data.test[[n]]).to(device) for n in (first, second))
        fractions, rows = torch.linspace(0, 1, num_columns).tolist(), []
        for t in times:
            trajectory = interpolate(process, model, x0, x0_other, t, fractions, clip_x0)
            between = check_finite(
                last_images(tqdm(trajectory, f"t = {t}", t, unit="step", disable=None))
            )
            rows.append(torch.cat([x0, between, x0_other]))
    save_grid(folder / "interpolation.png", torch.cat(rows), columns=num_columns + 2)
    print(f"{folder}/interpolation.png: rows of t = {', '.join(map(str, times))}")


@torch.no_grad()
def interpolate(
    process: DDPM,
    model: Network,
    x0: Tensor,
    x0_other: Tensor,
    t: int,
    fractions: Sequence[float],
    clip_x0: bool = True,
) -> Iterator[tuple[int, Tensor]]:
    """Images between x0 and x0_other (1, C, H, W), one for each fraction λ [Ho20 Section 4.4].

    xt ~ q(xt | x0),  x't ~ q(xt | x'0),  x̄t = (1-λ) xt + λ x't,  x̄0 ~ p(x0 | x̄t) by Algorithm 2

    Yields (s, x̄s) for s = t-1 ... 0.
    Each end has its own noise, which is the same for every λ. With the same noise at both ends x̄t
    would only be a noisy cross-fade of the images. At λ = ½ the standard deviation of the noise is
    1/√2 of that at the ends; lesson 6's slerp keeps it constant. At t = T the result depends on the
    noise alone, at small t on the two images almost alone.
    """
    t_batch = torch.tensor([t], device=x0.device)
    xt = process.q_sample(x0, t_batch, torch.randn_like(x0))
    xt_other = process.q_sample(x0_other, t_batch, torch.randn_like(x0))
    frac = torch.tensor(fractions, device=x0.device).view(-1, 1, 1, 1)
    between = (1 - frac) * xt + frac * xt_other
    for step in range(t, 0, -1):
        between = process.p_sample(model, between, step, clip_x0)
        yield step - 1, between


if __name__ == "__main__":
    cli.run(main)
