"""The shipped text-to-image network, sampled by DDIM."""

from benchmarks.quality import classifier
from common import lessons
from common.data import to_uint8
from common.device import autocast
from lesson_05.text_to_image.text import tokenize
from lesson_06 import sample_ddim
from lesson_06.ddim import ddim_sample

import torch

PROMPTS = ["0", "one", "the digit 2", "a handwritten three", "number 4", "a 5", "six"]
PROMPTS += ["a picture of a seven", "handwritten 8", "an image of the digit nine"]


def test_the_shipped_network_draws_the_digits_of_its_prompts():
    """Ten prompts, ten samples each, in 50 steps without guidance: at least 95 of 100 are right."""
    process, model, content = lessons.load(sample_ddim.SHIPPED)
    torch.manual_seed(0)
    with autocast(torch.device("cpu")):
        network = model.bind(tokenize(PROMPTS * 10))
        x0 = ddim_sample(network, process, torch.randn(100, *content.image_shape))
    _, probabilities = classifier.classify(classifier.load(), to_uint8(x0))
    digits = probabilities.argmax(1).view(10, 10)
    assert (digits == torch.arange(10)).sum() >= 95, digits
