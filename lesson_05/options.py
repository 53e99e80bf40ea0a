"""The flags of lesson 5's training scripts, besides those of every training run."""

from dataclasses import dataclass
from typing import Literal

from common.options import TrainingOptions
from lesson_05.ddpm import Variance


@dataclass
class DDPMOptions(TrainingOptions):
    """The flags of DDPM.

    Args:
        beta_1: variance of the first forward step, for T = 1000.
        beta_T: variance of the last one.
        variance: of the reverse steps [Ho20 Section 3.2].
    """

    beta_1: float = 1e-4
    beta_T: float = 0.02
    variance: Variance = "beta"


@dataclass
class ConditionalOptions(DDPMOptions):
    """The flags of a DDPM with labels.

    Args:
        drop_probability: that a label, or a prompt, is replaced by the null one, for each image by
            itself.
    """

    drop_probability: float = 0.1


@dataclass
class TextToImageOptions(ConditionalOptions):
    """The flags of a DDPM with prompts, which are about digits."""

    dataset: Literal["auto", "mnist", "digits"] = "auto"
