"""A few of the attempts to break the scripts; `make attempts` makes all of them."""

from common import checkpoint
from lesson_02 import parzen, swiss_roll
from lesson_05 import sample_mnist
from lesson_06 import laboratory
from lesson_09 import ablation, train_mnist
from lesson_09.unet import UNet as UNet9

import attempts
import pytest
import torch
from hostile_checkpoints import GOOD
from small_networks import save_small_checkpoint

SCRIPTS = [
    attempts.Script("lesson_02.parzen", parzen.main, False, {}),
    attempts.Script("lesson_02.swiss_roll", swiss_roll.main, False, {}),
    attempts.Script("lesson_05.sample_mnist", sample_mnist.main, False, {}),
    attempts.Script("lesson_06.laboratory", laboratory.main, False, {}),
    attempts.Script("lesson_09.ablation", ablation.main, False, {}),
    attempts.Script("lesson_09.train_mnist", train_mnist.main, True, {"network": UNet9}),
]


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_bad_numbers_are_refused_by_name(number, tmp_path, monkeypatch):
    """Five bad values, each at another flag."""
    monkeypatch.chdir(tmp_path)
    script = SCRIPTS[number]
    bad = [(flag, value) for flag, value, must in attempts.flag_attempts(script) if must]
    for flag, value in bad[number :: len(bad) // 5]:
        outcome = attempts.try_flag(script, flag, value, tmp_path, tmp_path)
        assert outcome.what == "refused", f"--{flag}={value}: {outcome}"


def test_wrong_kinds_in_a_checkpoint_are_refused(tmp_path):
    path = save_small_checkpoint(tmp_path, "lesson_05")
    good = checkpoint.load(path)
    paths = list(attempts.fields_of({"step": 1, "lesson": "", "config": good.config}))
    for k, field in enumerate(paths):
        for value in attempts.KINDS[k % 10 :: 10]:
            outcome = attempts.try_field(good, field, value, tmp_path)
            assert not outcome.what.startswith("fault"), f"{field} = {value!r:.50}: {outcome}"


def test_faults_are_found(tmp_path):
    """A traceback, a bad value that is accepted, and a file in another folder."""

    def fails(number: int = 1) -> None:
        """Fail.

        Args:
            number: which is not checked.
        """
        raise KeyError("oops")

    script = attempts.Script("test", fails, False, {})
    assert "KeyError" in attempts.try_flag(script, "number", "1", tmp_path, tmp_path).what
    assert attempts.try_flag(script, "number", "1:30", tmp_path, tmp_path).what == "refused"
    assert attempts.attempt(lambda: torch.nn.Linear(1, 1)(None), tmp_path).what == "began"
    kind = attempts.try_field(GOOD, ("config", "network", "num_groups"), True, tmp_path)
    assert kind.what == "refused"  # and not read as 1
