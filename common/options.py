"""The flags that scripts share, each defined once. Every field is a flag of the same name."""

from dataclasses import dataclass
from typing import Literal

from common.checkpoint import MAX_SIZES
from common.data import Dataset
from common.device import Precision
from common.errors import UserError, check_above, check_at_least, check_at_most

MAX_COUNT = 1_000_000  # of samples, and of the steps of a process


@dataclass
class ScriptOptions:
    """The flags of every script.

    Args:
        output_dir: folder for the files; output/ in the lesson's folder unless given.
        seed: seed of all random numbers.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: precision of the network; auto is bfloat16 if the hardware supports it; float32
            is exact, without CUDA's TF32.
    """

    output_dir: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"


@dataclass
class DataOptions:
    """The data set.

    Args:
        dataset: auto is MNIST or, if it is not available, scikit-learn's digits; folder is the
            PNG, JPEG or WebP files in data_dir, where each subfolder is a class.
        data_dir: folder of your images, or of a data set in torchvision's layout. A data set
            without this flag is read from $DIFFUSION_DATA or, if that is not set, from data/.
    """

    dataset: Dataset = "auto"
    data_dir: str | None = None


@dataclass
class ImageOptions(DataOptions):
    """The data set, and the shape of its images.

    Args:
        image_size: one number, or height and width: images are resized to cover this size, and
            cropped to their middle. Unless given they stay as they are.
        image_channels: 1 for grey, 3 for colour. Unless given it is what the data set has; for a
            folder 3 if any image has colour.
    """

    image_size: list[int] | None = None
    image_channels: Literal[1, 3] | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None:
            if len(self.image_size) not in (1, 2):
                raise UserError("image_size must be one number, or two: height and width")
            if not all(1 <= side <= MAX_SIZES["image_size"] for side in self.image_size):
                raise UserError(f"image_size is {self.image_size}: it must be from 1 to 4,096")
            self.image_size = [self.image_size[0], self.image_size[-1]]


@dataclass
class PictureOptions:
    """How samples are saved.

    Args:
        save_png: also save each image as a file of its own, in a folder.
        save_npz: also save the images as an array: key samples, uint8 (N, C, H, W).
        scale: pixels of a picture, across and down, for each pixel of an image.
        fps: frames of a GIF per second; it lasts four seconds unless given.
    """

    save_png: bool = False
    save_npz: bool = False
    scale: int = 2
    fps: float | None = None

    def __post_init__(self) -> None:
        check_at_least(1, scale=self.scale)
        if self.fps is not None:
            check_above(0, fps=self.fps)


@dataclass
class CheckpointOptions(ScriptOptions):
    """The checkpoint of a trained network.

    Args:
        model_checkpoint: a file or an http(s) address; the shipped checkpoint unless given.
        sha256: the expected sha256 of the file; any other file is refused.
    """

    model_checkpoint: str = ""
    sha256: str | None = None


@dataclass
class SamplingOptions(PictureOptions, CheckpointOptions):
    """The flags of the sampling scripts.

    Args:
        num_samples: number of images.
    """

    num_samples: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, num_samples=self.num_samples)
        check_at_most(MAX_COUNT, num_samples=self.num_samples)


@dataclass
class TrainingOptions(PictureOptions, ScriptOptions, ImageOptions):
    """The flags of every training script.

    Args:
        resume: checkpoint to resume from. Without a value, the latest in output_dir; auto is the
            latest if there is one, else a new run.
        start_from: checkpoint whose averaged weights a new run starts with. --resume ignores it.
        num_timesteps: T, the steps of the forward process.
        num_training_steps: number of optimiser steps.
        num_epochs: passes over the training images; overrides num_training_steps.
        minutes: minutes to train for, without the final samples; overrides num_training_steps. The
            number of steps follows from the speed of the first ones, and --resume keeps it.
        batch_size: images per step.
        learning_rate: Adam's learning rate after the warm-up.
        num_warmup_steps: steps over which the learning rate rises to learning_rate.
        decay_learning_rate: whether it then falls linearly to zero.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: decay of the moving average of the weights, which is used for sampling.
        num_samples: images to sample at the end, 0 for none.
        compile: use torch.compile, which takes a minute or more at the start.
        accumulate: number of microbatches per batch; more need less memory.
        max_bad_steps: number of steps that may be skipped because loss or gradient is not finite.
        log_every: steps between rows of metrics.csv.
        tensorboard: also write losses and previews for TensorBoard, which must be installed.
        preview_every: steps between previews.
        num_previews: images in a preview.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many of them to keep, the last ones, or all. One whose weights gave a
            finite loss is always kept.
    """

    resume: str | None = None
    start_from: str | None = None
    num_timesteps: int = 1000
    num_training_steps: int = 10_000
    num_epochs: int | None = None
    minutes: float | None = None
    batch_size: int = 128
    learning_rate: float = 2e-4
    num_warmup_steps: int = 5000
    decay_learning_rate: bool = False
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    num_samples: int = 64
    compile: bool = False
    accumulate: int = 1
    max_bad_steps: int = 0
    log_every: int = 100
    tensorboard: bool = False
    preview_every: int = 500
    num_previews: int = 64
    checkpoint_every: int = 500
    keep_checkpoints: int | Literal["all"] = 2

    def __post_init__(self) -> None:
        ImageOptions.__post_init__(self)
        PictureOptions.__post_init__(self)
        names = ["log_every", "preview_every", "num_previews", "checkpoint_every", "accumulate"]
        names += ["num_timesteps", "num_training_steps", "batch_size"]
        check_at_least(1, **{name: getattr(self, name) for name in names})
        most = {"num_previews": self.num_previews, "num_samples": self.num_samples}
        check_at_most(MAX_COUNT, **most, num_timesteps=self.num_timesteps)
        check_at_least(0, max_bad_steps=self.max_bad_steps, num_samples=self.num_samples)
        check_at_least(0, num_warmup_steps=self.num_warmup_steps)
        check_above(0, learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        if self.num_epochs is not None:
            check_at_least(1, num_epochs=self.num_epochs)
        if self.minutes is not None:
            check_above(0, minutes=self.minutes)
            if self.num_epochs is not None:
                raise UserError("--minutes and --num_epochs exclude each other: give one of them")
        if self.keep_checkpoints != "all":
            check_at_least(1, keep_checkpoints=self.keep_checkpoints)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 1: warm-up, then constant or linear decay."""
        rate = self.learning_rate * min(1.0, step / max(self.num_warmup_steps, 1))
        return (
            rate * (1 - (step - 1) / self.num_training_steps) if self.decay_learning_rate else rate
        )
