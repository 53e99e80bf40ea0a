"""A small classifier of MNIST's digits, whose features tell how close samples are to real images.

What Inception's features are to photographs, these are to digits: Inception has never seen one.
The file beside this one is shipped; its sum is checked whenever it is loaded. It was made by

    python -m common.classifier

with these defaults: 12 epochs of MNIST's 60,000 training images, seed 0, bfloat16; 7 minutes of one
core of an AMD EPYC. In float32 it has 99.62 % of the 10,000 test images right.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoint, cli, mnist
from common.device import Precision, autocast, hardware, pick_device
from common.images import from_uint8
from common.run import check

FILE = Path(__file__).with_name("classifier.pt")
SHA256 = "39a03a89a6e9eb5b72ae8c226ede7d14977e5356b1746754a6fadaaba248586f"


class Classifier(nn.Module):
    """Images in [-1, 1] (B, 1, 28, 28) -> log-odds of the ten digits (B, 10).

    Args:
        channels: of each level; a level halves the size.
        num_hidden: features of the last layer but one.
        dropout: of these, while training.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 64),
        num_hidden: int = 64,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.channels, self.num_hidden = list(channels), num_hidden
        self.num_features = self.channels[-1]
        layers: list[nn.Module] = []
        before = 1
        for width in channels:
            layers += [*convolution(before, width), *convolution(width, width), nn.MaxPool2d(2)]
            before = width
        self.convolutions = nn.Sequential(*layers)
        size = 28 // 2 ** len(channels)
        self.hidden = nn.Linear(before * size * size, num_hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(num_hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.features_and_odds(images)[1]

    def features_and_odds(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, num_features), the means of the last convolution's maps, as with Inception; and the
        log-odds (B, 10).

        The hidden layer after it would not do: there each digit is nearly one point, and a distance
        between sets of images would tell little more than how many there are of each.
        """
        maps = self.convolutions(images)
        hidden = F.relu(self.hidden(maps.flatten(1)))
        return maps.mean((2, 3)), self.out(self.dropout(hidden))


def convolution(before: int, after: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


def load(file: Path = FILE, sha256: str | None = SHA256) -> Classifier:
    """The shipped classifier, in eval mode; a file with another sum is refused."""
    content = checkpoint.load(file, "common.classifier", sha256)
    with checkpoint.must_fit(file):
        return checkpoint.load_weights(Classifier(**content["config"]["network"]), content)


@torch.no_grad()
def look(model: Classifier, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, num_features), float64, and probabilities (N, 10) of 8-bit images, in float32.

    Samples are seen as the 8-bit images that they would be written as, like the real ones.
    """
    device = model.out.weight.device
    features, probabilities = [], []
    with autocast(device, "float32"):
        batches = levels.split(500)
        for batch in tqdm(batches, "classifier", leave=False, disable=len(batches) < 10):
            means, odds = model.features_and_odds(from_uint8(batch.to(device)))
            features.append(means.double().cpu())
            probabilities.append(odds.softmax(1).cpu())
    return torch.cat(features), torch.cat(probabilities)


def accuracy(model: Classifier, levels: Tensor, labels: Tensor) -> float:
    _, probabilities = look(model, levels)
    return (probabilities.argmax(1) == labels).double().mean().item()


def moved(images: Tensor) -> Tensor:
    """Each image turned, slanted, stretched and shifted a little, in its own way."""
    count = len(images)
    turn, slant = (torch.rand(2, count, device=images.device) - 0.5) * 0.35  # radians, -10° to 10°
    stretch = 1 + (torch.rand(2, count, device=images.device) - 0.5) * 0.2
    shift = (torch.rand(2, count, device=images.device) - 0.5) * 0.28  # -2 to 2 pixels of 28
    cos, sin = turn.cos(), turn.sin()
    row1 = torch.stack([cos * stretch[0], (slant - sin) * stretch[0], shift[0]], 1)
    row2 = torch.stack([sin * stretch[1], cos * stretch[1], shift[1]], 1)
    grid = F.affine_grid(torch.stack([row1, row2], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside is black, -1


def main(
    data_dir: str | None = None,
    num_epochs: int = 12,
    batch_size: int = 128,
    learning_rate: float = 0.005,
    weight_decay: float = 0.01,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Train the classifier on MNIST and write classifier.pt, in half precision.

    Args:
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        num_epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: the highest of one cycle, of AdamW.
        weight_decay: of AdamW.
        output_dir: folder of the file; output/ beside this script unless given.
        seed: of the weights, the order of the images and how they are moved.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the training's arithmetic; auto is bfloat16 where the hardware has it.
    """
    check(lambda value: value >= 1, "at least 1", num_epochs=num_epochs)
    place = pick_device(device)
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)
    data = mnist.load("mnist", data_dir)
    torch.manual_seed(seed)
    batches = mnist.Batches(data.train, data.train_labels, batch_size, seed, place)
    model = Classifier().to(place).to(memory_format=torch.channels_last)
    steps = num_epochs * batches.per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {hardware(place)}")
    bar = tqdm(range(1, steps + 1), unit="step")
    for step in bar:
        images, labels = batches[step]
        with autocast(place, precision):
            loss = F.cross_entropy(model(moved(images)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % batches.per_epoch == 0:
            model.eval()
            share = accuracy(model, data.test, data.test_labels)
            model.train()
            bar.write(f"epoch {step // batches.per_epoch}: {100 * share:.2f} % of the test images")
    save(folder / "classifier.pt", model, data, steps)


def save(path: Path, model: Classifier, data: mnist.Images, steps: int) -> None:
    """Write the small file, and say what it can."""
    network = {"channels": model.channels, "num_hidden": model.num_hidden}
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    content = {"lesson": "common.classifier", "config": {"network": network}}
    checkpoint.save(path, {**content, "dataset": data.name, "step": steps, "ema": weights})
    written = load(path, sha256=None)
    share = accuracy(written, data.test, data.test_labels)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {100 * share:.2f} % of the test images")
    print(f"sha256 {digest}")


if __name__ == "__main__":
    cli.run(main)
