"""The flags of lesson 5's training scripts, besides those of every training run."""

from dataclasses import dataclass
from typing import Literal

from common.options import TrainingOptions
from lesson_05.ddpm import Objective, Prediction, Variance, linear_beta


@dataclass
class ProcessOptions(TrainingOptions):
    """The flags of the forward and the reverse process.

    Args:
        beta_1: variance of the first forward step, if T is 1000.
        beta_T: variance of the last forward step, if T is 1000.
        variance: variance of the reverse steps [Ho20 Section 3.2].
    """

    beta_1: float = 1e-4
    beta_T: float = 0.02
    variance: Variance = "beta"

    def __post_init__(self) -> None:
        super().__post_init__()
        linear_beta(self.num_timesteps, self.beta_1, self.beta_T)  # says what is wrong with them


@dataclass
class DDPMOptions(ProcessOptions):
    """The flags of a DDPM without conditions.

    Args:
        prediction: what the network predicts; the noise, the image x0 or the mean [Ho20 Table 2].
        loss: the squared error of the prediction, or the bound [Ho20 Table 2].
    """

    prediction: Prediction = "eps"
    loss: Objective = "simple"


@dataclass
class ConditionalOptions(ProcessOptions):
    """The flags of a DDPM with labels or prompts.

    Args:
        drop_probability: probability that the condition of an image, its label or its prompt, is
            replaced by the null condition.
    """

    drop_probability: float = 0.1


@dataclass
class TextToImageOptions(ConditionalOptions):
    """The flags of a DDPM with prompts, which name digits or, for a folder, its classes."""

    dataset: Literal["auto", "mnist", "digits", "folder"] = "auto"
