"""Lesson 9's samplers of t."""

import math
from collections import deque

from common.errors import UserError
from lesson_09.timesteps import LossAwareTimesteps, UniformTimesteps, named_sampler

import pytest
import torch
from torch import Tensor


def filled(terms: Tensor) -> LossAwareTimesteps:
    """A sampler in which the term of every t was recorded ten times."""
    sampler = LossAwareTimesteps(len(terms))
    for _ in range(10):
        sampler.update(torch.arange(1, len(terms) + 1), terms)
    return sampler


def test_importance_weights_average_to_one_and_reduce_the_variance():
    terms = 1 / torch.arange(1, 101)
    sampler = filled(terms)
    p, terms = sampler.weights().double(), terms.double()
    assert torch.allclose(p, 0.999 * terms / terms.sum() + 0.001 / 100)
    weight = 1 / (100 * p)
    assert (p * weight).sum().item() == pytest.approx(1)
    mean = (p * weight * terms).sum().item()
    assert mean == pytest.approx(terms.mean().item())
    variance = (p * (weight * terms) ** 2).sum().item() - mean**2
    uniform = (terms**2).mean().item() - mean**2
    assert variance < uniform / 100
    t, drawn = sampler.sample(50_000)
    assert torch.allclose(drawn.double(), weight[t - 1])
    counts = torch.bincount(t - 1, minlength=100).double()
    assert ((counts - 50_000 * p).abs() < 5 * (50_000 * p).sqrt() + 1).all()
    assert drawn.mean().item() == pytest.approx(1, abs=5 * drawn.std().item() / 50_000**0.5)


def test_weights_come_from_second_moments():
    sampler = LossAwareTimesteps(2)
    for k in range(10):
        sampler.update(torch.tensor([1, 2]), torch.tensor([2.0 * (k % 2), 1.0]))
    root = math.sqrt(2)  # of the mean square of 0, 2, 0, 2, ...; the mean is 1 for both
    expected = 0.999 * root / (root + 1) + 0.0005
    assert sampler.weights()[0].item() == pytest.approx(expected)


def test_all_t_have_the_same_probability_until_each_has_ten_terms():
    sampler = LossAwareTimesteps(4)
    for k in range(40):
        assert torch.allclose(sampler.weights(), torch.full((4,), 0.25))
        t, weight = sampler.sample(8)
        assert set(t.tolist()) <= {1, 2, 3, 4}
        assert (weight == 1).all()
        sampler.update(torch.tensor([k // 10 + 1]), torch.tensor([float(k // 10 + 1)]))
    assert sampler.weights()[3] > 0.39
    assert torch.allclose(filled(torch.zeros(3)).weights(), torch.full((3,), 1 / 3))


def test_history_is_the_last_ten_terms_of_each_t():
    """Compared with one queue for each t, for batches with few and with many of one t."""
    sampler = LossAwareTimesteps(3)
    queues = [deque(maxlen=10) for _ in range(3)]
    for size in (1, 7, 64, 30, 2, 64, 5):
        t, terms = torch.randint(1, 4, (size,)), torch.rand(size)
        sampler.update(t, terms)
        for time, term in zip(t.tolist(), terms.tolist(), strict=True):
            queues[time - 1].append(term)
        for queue, row in zip(queues, sampler.terms, strict=True):
            assert sorted(row[row != 0].tolist()) == pytest.approx(sorted(queue))
    copy = LossAwareTimesteps(3)
    copy.load_state_dict(sampler.state_dict())
    assert torch.equal(copy.weights(), sampler.weights())


def test_uniform_sampler_has_the_same_methods_and_no_state():
    sampler = named_sampler("uniform", 50)
    assert isinstance(sampler, UniformTimesteps)
    t, weight = sampler.sample(5000)
    sampler.update(t, torch.rand(5000))
    assert (t.min(), t.max()) == (1, 50)
    assert (weight == 1).all()
    assert weight.dtype == torch.float32
    assert torch.allclose(sampler.weights(), torch.full((50,), 0.02))
    assert not sampler.state_dict()
    assert sampler.to("meta").sample(3)[0].device.type == "meta"  # on the sampler's device
    with pytest.raises(UserError, match="uniform or loss_aware"):
        named_sampler("greedy", 50)
