"""A few samples of every shipped checkpoint, to be drawn again by the tests.

python tests/shipped.py     # stores them anew: after a checkpoint was replaced, and only then
"""

from pathlib import Path

import numpy as np
import torch

from common.subject import Subject

ROOT = Path(__file__).resolve().parent.parent
STORED = Path(__file__).with_name("shipped.npz")
FILES = sorted(ROOT.glob("lesson_*/pretrained/*.pt")) + sorted(
    ROOT.glob("lesson_*/*/pretrained/*.pt")
)
NUM_STEPS = 10
DIGITS = torch.tensor([3, 7])


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def samples(file: Path) -> torch.Tensor:
    """Two samples, float32 in [-1, 1]: of seed 0, in ten steps of DDIM, which add no noise; lesson
    2's in all its own."""
    cpu = torch.device("cpu")
    if file.parts[-3] == "lesson_02":
        subject = Subject(str(file), "ddpm", None, 1.0, cpu)
    else:
        subject = Subject(str(file), "ddim", NUM_STEPS, 1.0, cpu)
    torch.manual_seed(0)
    return subject.images(DIGITS, 0).clamp(-1, 1)


if __name__ == "__main__":
    arrays = {name(file): samples(file).half().numpy() for file in FILES}
    np.savez_compressed(STORED, **arrays)
    print(f"{STORED}: {', '.join(arrays)}, {STORED.stat().st_size:,} bytes")
