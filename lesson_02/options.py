"""The flags of lesson 2's training, besides those of every training run."""

from dataclasses import dataclass

from common.errors import check_at_least
from common.options import TrainingOptions


@dataclass
class DPMOptions(TrainingOptions):
    """The flags of DPM.

    Args:
        learned_beta: whether the rates β_2..β_T are trained, too [SD15 Section 2.4.1].
        dequantize: whether uniform noise of one level's width is added to the 8-bit levels. With
            1000 steps it hardly matters, since the noise of the first step is wider. With a much
            smaller β_1 the model could learn the grid of the levels without it.
        num_strata: number of parts of 2..T from which a batch's t are drawn; parts at later t are
            longer. With T - 1 parts t is drawn uniformly, as in the paper.
        num_bound_images: number of training and of test images for the bound at the end; fewer
            during training.
    """

    batch_size: int = 512
    learning_rate: float = 1e-3
    num_warmup_steps: int = 200
    decay_learning_rate: bool = True
    ema_decay: float = 0.999
    learned_beta: bool = False
    dequantize: bool = True
    num_strata: int = 32
    num_bound_images: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, num_bound_images=self.num_bound_images)
