"""The comparisons with other libraries and other commits, with tiny networks."""

import json
import math
import shutil
from functools import partial

from benchmarks import records
from benchmarks.quality.metrics import Reference
from benchmarks.speed import before, bench, contenders, parts, race, timing
from common import cli
from common.errors import UserError
from lesson_05.unet import SelfAttention

import pytest
import torch
from helpers import ROOT, error_line

CPU = torch.device("cpu")
NETWORK = {
    "channels": 8,
    "multipliers": [1, 2, 2],
    "num_blocks": 1,
    "attention_resolutions": [8, 7],
    "num_heads": 1,
    "dropout": 0.0,
    "num_groups": 4,
}
LIBRARIES = ("diffusers", "denoising_diffusion_pytorch")


@pytest.fixture
def libraries() -> None:
    for library in LIBRARIES:
        pytest.importorskip(library)


@pytest.fixture
def tiny(monkeypatch) -> None:
    """Small networks in place of every preset's, and small matrices."""
    monkeypatch.setattr(bench, "matrix_peak", partial(bench.matrix_peak, size=256))
    for module in (bench, parts):
        monkeypatch.setattr(module, "preset", lambda name: {"network": NETWORK})


def test_diffusers_network_has_the_shape_of_lesson_5s():
    pytest.importorskip("diffusers")
    for size in (28, 32):
        ours = contenders.lesson_5(NETWORK, 1, size).model
        theirs = contenders.diffusers(NETWORK, 1, size).model
        assert contenders.count(ours) == contenders.count(theirs)
    with pytest.raises(UserError, match="num_heads 1"):
        contenders.unet2d({**NETWORK, "num_heads": 2}, 1, 28)


def test_denoising_diffusions_network_has_the_size_of_lesson_5s():
    pytest.importorskip("denoising_diffusion_pytorch")
    for name in ("paper", "laptop"):
        network = contenders.preset(name)["network"]
        with torch.device("meta"):
            ours = contenders.lesson_5(network, 1, 32).model
            theirs = contenders.unet(network, 1, 32)
        assert 0.8 < contenders.count(theirs) / contenders.count(ours) < 1.25, name


@pytest.mark.usefixtures("libraries")
def test_every_contender_trains_and_samples():
    xt = torch.randn(2, 1, 32, 32)
    for make in contenders.CONTENDERS.values():
        contender = make(NETWORK, 1, 32)
        contender.to(CPU)
        step = contenders.training_step(contender, 2, "float32", CPU)
        initial = [p.detach().clone() for p in contender.model.parameters()]
        step()
        step()
        trained = list(contender.model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(initial, trained, strict=True))
        with torch.no_grad():
            assert contender.p_sample(xt, 1000).shape == xt.shape
            assert torch.isfinite(contender.p_sample(xt, 1)).all(), contender.name


def test_times_are_medians_measured_in_alternation(monkeypatch):
    durations = [100, 100, 1, 1, 2, 2, 3, 3]  # the first round is slow, and is not counted
    order, clock = [], iter([moment for d in durations for moment in (0, d)])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    assert timing.median_times(functions, 3, "") == {"a": 2, "b": 2}
    assert order == list("abababab")


def test_each_contender_is_compared_in_its_fastest_way():
    times = {("lesson 5", "float32", "x"): 2.0, ("lesson 5", "bfloat16", "x"): 1.0}
    times |= {("other", "float32", "x"): 3.0, ("other", "bfloat16", "x"): 4.0}
    result = timing.compare(times, 8)
    assert result["ratio"]["other, best"] == 3.0  # the other's fastest is float32
    assert result["ratio"]["other, bfloat16"] == 4.0
    assert result["images_per_second"]["lesson 5, bfloat16, x"] == 8.0


@pytest.mark.usefixtures("tiny", "libraries")
def test_the_bench_writes_its_report(tmp_path):
    flags = ["--batch_size", "2", "--repeats", "1", "--whole_repeats", "1", "--num_samples", "1"]
    flags += ["--num_steps", "25", "--device", "cpu", "--output_dir", str(tmp_path)]
    names = ["training", "sampling", "bookkeeping", "attention", "whole"]
    cli.run(bench.main, [*flags, "--parts", *names])
    result = json.loads((tmp_path / "bench.json").read_text())
    assert 0 < result["training"]["share_of_peak"]["float32"] < 1
    for part in (result["training"], result["sampling"], *result["whole"].values()):
        assert all(math.isfinite(ratio) for ratio in part["ratio"].values())
    assert len(result["training"]["images_per_second"]) == 12
    flops = result["training"]["flops_per_image"]
    assert flops["lesson 5"] <= flops["diffusers"]
    assert set(result["whole"]) == {"DDPM, 25 steps", "DDIM, 1 steps"}
    assert all(0 < share < 1 for share in result["bookkeeping"].values())
    text = (tmp_path / "bench.md").read_text()
    assert "| diffusers, best |" in text
    assert "Lesson 5's training step reaches" in text
    assert "How its time is spent" in text
    assert "- laptop, 7x7, " in text.split("Attention, forward and backward")[1]


@pytest.mark.usefixtures("tiny")
def test_the_bookkeeping_of_a_training_step_is_measured():
    shares = parts.bookkeeping(2, 1, CPU)
    assert list(shares) == ["laptop, batches of 64", "paper, batches of 2"]
    assert all(0 < share < 1 for share in shares.values())


def test_fused_attention_computes_what_lesson_5s_does():
    written_out, fused = (
        kind(8, num_heads=2, num_groups=4) for kind in (SelfAttention, parts.FusedAttention)
    )
    torch.nn.init.normal_(written_out.out.weight)
    fused.load_state_dict(written_out.state_dict())
    h = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(fused(h), written_out(h))
    assert (fused(h) - h).abs().max() > 0.1


def test_the_time_of_a_step_is_attributed_to_kinds_of_operations():
    a, h = torch.randn(300, 300), torch.randn(4, 16, 32, 32)
    conv, norm = torch.nn.Conv2d(16, 16, 3), torch.nn.GroupNorm(1, 16)
    steps = {
        "matrix products": lambda: [a @ a for _ in range(9)],
        "convolutions": lambda: conv(h).sum().backward(),
        "group norms": lambda: [norm(h) for _ in range(9)],
    }
    for kind, step in steps.items():
        spent = parts.time_by_kind(step, CPU)
        assert sum(spent.values()) == pytest.approx(1)
        assert next(iter(spent)) == kind, spent


def test_before_and_after_are_measured_in_alternation(tmp_path, monkeypatch):
    folder = tmp_path / "old"
    for package in ("common", "lesson_05"):
        unwanted = shutil.ignore_patterns("__py*", "output")
        shutil.copytree(ROOT / package, folder / package, ignore=unwanted)
    process = folder / "lesson_05" / "ddpm.py"
    slow = "def loss(self, *a):\n        __import__('time').sleep(1)\n"
    slow += "        return self.fast(*a)\n\n"
    process.write_text(process.read_text().replace("def loss(", slow + "    def fast("))
    monkeypatch.setattr(before, "unpack", lambda commit, place: folder)
    flags = ["--commit", "old", "--networks", "laptop", "--repeats", "1", "--steps", "1"]
    cli.run(before.main, [*flags, "--device", "cpu", "--output_dir", str(tmp_path / "out")])
    seconds = json.loads((tmp_path / "out" / "before.json").read_text())["seconds"]
    slowed = seconds["before"]["laptop, training"]
    assert slowed > 1
    assert slowed - seconds["after"]["laptop, training"] > 0.5
    assert slowed - seconds["before"]["laptop, sampling"] > 0.5
    assert "| laptop preset, 64 images, sampling |" in (tmp_path / "out" / "before.md").read_text()


def test_a_commit_that_does_not_exist_is_named(tmp_path, capsys):
    flags = ["--commit", "nowhere", "--device", "cpu", "--output_dir", str(tmp_path)]
    error = error_line(capsys, before.main, *flags)
    assert "commit 'nowhere' cannot be unpacked" in error


def test_missing_libraries_are_named(digits, monkeypatch):
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    for begin in (lambda: contenders.environment(CPU), lambda: Reference(digits, CPU)):
        with pytest.raises(UserError, match=r"pip install -r benchmarks/requirements\.txt"):
            begin()


@pytest.mark.usefixtures("libraries")
def test_memory_is_that_of_a_process_of_its_own():
    ballast = torch.ones(3 * 10**8)  # 1.2 GB in this process, which must not be counted
    measured = parts.memory(contenders.preset("laptop")["network"], 1, CPU)
    assert len(measured) == 3
    for gigabytes in measured.values():
        assert 0.1 < gigabytes < ballast.nbytes / 1e9


@pytest.mark.usefixtures("libraries")
def test_networks_that_one_of_the_three_cannot_have_are_refused(digits):
    race.check_network(NETWORK, digits)
    for change in ({"foo": 1}, {"num_heads": 2}):
        with pytest.raises(UserError):
            race.check_network(NETWORK | change, digits)


def test_lesson_5_races_with_its_own_training_script(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "NUM_TRIAL_STEPS", 2)
    laptop = race.preset("laptop") | {"num_timesteps": 25, "batch_size": 8}
    monkeypatch.setattr(race, "preset", lambda name: laptop)
    small = NETWORK | {"channels": 4}
    conditions = race.Conditions(digits, None, small, 0.1, 2, 1e-3, tmp_path, CPU, 0)
    draw, figures = race.lesson_5(conditions)
    levels, seconds = race.draw_levels(draw, 3, 0)
    assert levels.shape == (3, 1, 28, 28)
    assert levels.dtype == torch.uint8
    assert seconds > 0
    assert figures["steps"] >= 2
    assert figures["batch_size"] == 8
    assert torch.equal(race.draw_levels(draw, 3, 0)[0], levels)


@pytest.mark.usefixtures("libraries")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data")
def test_a_race_trains_all_three_and_compares_them(tmp_path, monkeypatch):
    monkeypatch.setattr(race, "NUM_TRIAL_STEPS", 2)
    small = {"channels": 4, "multipliers": [1, 1, 1], "attention_resolutions": [7]}
    race.main(
        minutes=0.01,
        num_samples=65,
        num_steps=2,
        dataset="digits",
        network={**NETWORK, **small},
        output_dir=str(tmp_path),
        device="cpu",
    )
    result = json.loads((tmp_path / "race.json").read_text())
    for name in ("lesson 5", "diffusers", "denoising-diffusion-pytorch"):
        assert result[name]["steps"] >= 1
        assert math.isfinite(result[name]["fid"])
    assert (tmp_path / "race.png").stat().st_size > 0
    files = ["race.json", "race.md", "race.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    rows = [line for line in (tmp_path / "race.md").read_text().splitlines() if "|" in line]
    names = [row.split("|")[1].strip() for row in rows[2:]]
    assert names == [*race.RACERS, "real training images"]
    assert len({row.count("|") for row in rows}) == 1
