"""Between two images, by way of their noise: Section 4.4 of Ho et al. 2020."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common import checkpoint, cli, mnist
from common.device import Precision, autocast, pick_device
from common.errors import UserError
from common.images import from_uint8, save_grid
from lesson_05.ddpm import DDPM, Network
from lesson_05.sample_mnist import SHIPPED, load


def main(
    model_checkpoint: str = SHIPPED,
    first: int = 0,
    second: int = 1,
    times: list[int] | None = None,
    num_columns: int = 9,
    clip_x0: bool = True,
    dataset: mnist.Dataset = "auto",
    data_dir: str | None = None,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    sha256: str | None = None,
) -> None:
    """Interpolate between two test images [Ho20 Section 4.4].

    Writes interpolation.png: a row for each t, from little noise to pure noise, with the images
    themselves at the ends.

    Args:
        model_checkpoint: a file, or an http(s) address; the shipped one unless given.
        first: number of the one test image, counted from 0.
        second: number of the other.
        times: t of each row, 1 to T; the quarters of T unless given.
        num_columns: interpolated images in a row, from all of the first to all of the second.
        clip_x0: whether each estimate of the clean image is clipped to [-1, 1].
        dataset: whose test images; auto is MNIST or, failing that, scikit-learn's digits.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        output_dir: folder of the picture; output/ in this lesson's folder unless given.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
        sha256: refuse a file with another sum.
    """
    place = pick_device(device)
    process, model, content = load(model_checkpoint, sha256=sha256)
    T = process.num_timesteps
    times = [max(1, T * k // 4) for k in (1, 2, 3, 4)] if times is None else times
    if not times or not all(1 <= t <= T for t in times) or num_columns < 2:
        raise UserError(
            f"times {times} in {num_columns} columns: take one or more of 1 to {T}, and 2 columns"
        )
    data = mnist.load(dataset, data_dir)
    for number in (first, second):
        if not 0 <= number < len(data.test):
            raise UserError(f"there is no test image {number}: take 0 to {len(data.test) - 1}")
    if data.channels != content["config"]["network"]["image_channels"]:
        raise UserError(f"{data} is not what {model_checkpoint} was trained on: give --dataset")
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)

    process, model = process.to(place), model.to(place)
    x0, x0_other = (from_uint8(data.test[[n]]).to(place) for n in (first, second))
    fractions = torch.linspace(0, 1, num_columns).tolist()
    torch.manual_seed(seed)
    rows = []
    with autocast(place, precision), tqdm(total=sum(times), unit="step", desc="sampling") as bar:
        for t in times:
            between = interpolate(process, model, x0, x0_other, t, fractions, clip_x0, bar.update)
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
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Images between x0 and x0_other (1, C, H, W), one for each fraction λ [Ho20 Section 4.4].

    xt ~ q(xt | x0),  x't ~ q(xt | x'0),  x̄t = (1-λ) xt + λ x't,  x̄0 ~ p(x0 | x̄t) by Algorithm 2

    The noise of either end is drawn once, on its own, and kept for every λ. With the same noise
    at both ends x̄t would be a cross-fade of the images, noised: nothing to interpolate. Halfway
    the noise has 1/√2 of its size; lesson 6's slerp keeps it. t = T shows how far x_T alone
    decides the image, a small t the images and little else.
    """
    t_batch = torch.tensor([t], device=x0.device)
    xt = process.q_sample(x0, t_batch, torch.randn_like(x0))
    xt_other = process.q_sample(x0_other, t_batch, torch.randn_like(x0))
    frac = torch.tensor(fractions, device=x0.device).view(-1, 1, 1, 1)
    between = (1 - frac) * xt + frac * xt_other
    for step in range(t, 0, -1):
        between = process.p_sample(model, between, step, clip_x0)
        if on_step is not None:
            on_step()
    return between


if __name__ == "__main__":
    cli.run(main)
