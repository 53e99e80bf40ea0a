"""Does the network read its prompt? The loss on test images with a right prompt, with the null
prompt, and with a prompt for another class, as for labels in ../class_conditional/health.py."""

from dataclasses import dataclass

from common import cli
from lesson_05.class_conditional.health import HealthOptions, run
from lesson_05.guidance import Guided
from lesson_05.text_to_image.sample_mnist import SHIPPED, load
from lesson_05.text_to_image.text import all_prompts

import torch
from torch import Tensor


@dataclass
class Options(HealthOptions):
    """A trained network with prompts, and the test images to measure it on."""

    model_checkpoint: str = SHIPPED


def main(options: Options = Options()) -> None:
    """Compare the loss with a right prompt, the null prompt and a wrong one. Writes health.md.

    The templates of the prompts take turns.
    """
    process, model, content = load(options.model_checkpoint, options.sha256)
    prompts = all_prompts(model.classes)

    def bind(label: Tensor, guidance: float) -> Guided:
        template = torch.arange(len(label)) % prompts.shape[1]
        return model.bind(prompts[label.cpu(), template].to(label.device), guidance)

    run("lesson_05.text_to_image", process, bind, content, list(model.classes), options)


if __name__ == "__main__":
    cli.run(main)
