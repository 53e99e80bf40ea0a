"""Does the network use its condition? The loss on test images with the right label, with the null
class, and with a wrong label.

The three are measured with the same images, times and noise. In a network that has learned its
labels the right label has the lowest loss and a wrong one the highest.
"""

from collections.abc import Callable
from dataclasses import dataclass

from common import cli
from common.checkpoint import Checkpoint
from common.data import from_uint8, load_images_for
from common.errors import UserError, check_at_least
from common.options import CheckpointOptions, DataOptions
from common.sampling import inference
from lesson_05.class_conditional.sample_mnist import SHIPPED, load
from lesson_05.ddpm import DDPM, Network

import torch
from torch import Tensor
from tqdm import tqdm

Bind = Callable[[Tensor, float], Network]
CONDITIONS = ("right", "null", "wrong")


@dataclass
class HealthOptions(CheckpointOptions, DataOptions):
    """A trained network, and the test images to measure it on.

    Args:
        num_images: number of test images, the first ones.
    """

    model_checkpoint: str = SHIPPED
    num_images: int = 1000

    def __post_init__(self) -> None:
        check_at_least(2, num_images=self.num_images)


def main(options: HealthOptions = HealthOptions()) -> None:
    """Compare the loss with the right label, the null class and a wrong label. Writes health.md."""
    process, model, content = load(options.model_checkpoint, options.sha256)
    run("lesson_05.class_conditional", process, model.bind, content, model.classes, options)


def run(
    lesson: str,
    process: DDPM,
    bind: Bind,
    content: Checkpoint,
    classes: list[str],
    options: HealthOptions,
) -> None:
    """Measure the losses, print them and write them into health.md.

    Args:
        lesson: the lesson whose folder has the output.
        process: the process.
        bind: bind(label, guidance) is the network for these classes; 0 is the null condition.
        content: the checkpoint.
        classes: the names of its classes.
        options: the flags.
    """
    if len(classes) < 2:
        raise UserError(f"the network has {len(classes)} class: a wrong one needs a second")
    data = load_images_for(content, options.dataset, options.data_dir)
    if data.test_labels.max() >= len(classes):
        raise UserError(f"{data} has other classes than the network: change --dataset")
    with inference(options, lesson) as (folder, device):
        process = process.to(device)
        x0 = from_uint8(data.test[: options.num_images]).to(device)
        label = data.test_labels[: options.num_images].to(device)
        text = table(losses(process, bind, x0, label, len(classes)))
    (folder / "health.md").write_text(text, encoding="utf-8")
    print(f"{text}{len(x0)} test images, {folder}/health.md")


@torch.no_grad()
def losses(process: DDPM, bind: Bind, x0: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """The losses (conditions, quarters of t, images), with the same noise for each condition.

    In each quarter the times are evenly spaced over the images x0 (B, C, H, W). Wrong labels are
    drawn from the other classes.
    """
    T, size = process.num_timesteps, 64
    eps = torch.randn(4, *x0.shape, device=x0.device)
    other = torch.randint(1, num_classes, label.shape, device=label.device)
    conditions = ((label, 1.0), (label, 0.0), ((label + other) % num_classes, 1.0))
    quarters = []
    for k in tqdm(range(4), "quarters of t", disable=None):
        first, last = T * k // 4 + 1, max(T * (k + 1) // 4, T * k // 4 + 1)
        t = torch.linspace(first, last, len(x0), device=x0.device).round().long()
        parts = [slice(i, i + size) for i in range(0, len(x0), size)]
        rows = [
            [process.loss(bind(c[i], guidance), x0[i], t[i], eps[k, i]) for i in parts]
            for c, guidance in conditions
        ]
        quarters.append(torch.stack([torch.cat(row) for row in rows]))
    return torch.stack(quarters, dim=1).float()


def table(values: Tensor) -> str:
    """Markdown: the mean loss of each condition by quarter of t; below, what null and wrong add to
    it, with the standard error over images."""
    values = torch.cat([values, values.mean(1, keepdim=True)], dim=1)
    lines = ["| condition | first quarter | second | third | fourth | all |", "|---|" + 5 * "---|"]
    for name, row in zip(CONDITIONS, values.mean(2).tolist(), strict=True):
        lines.append(f"| {name} | " + " | ".join(f"{value:.3g}" for value in row) + " |")
    for name, row in zip(CONDITIONS[1:], values[1:] - values[0], strict=True):
        errors = row.std(1) / row.shape[1] ** 0.5
        cells = [f"{d:.2g} ± {e:.1g}" for d, e in zip(row.mean(1).tolist(), errors, strict=True)]
        lines.append(f"| {name} - right | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
