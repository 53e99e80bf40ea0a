"""The scoreboard's table, and the comparisons with other libraries, each tiny."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from conftest import ROOT

from benchmarks import before, bench, contenders, parts, scoreboard, timing
from common import cli, lessons, mnist
from common.errors import UserError
from common.metrics import Reference
from lesson_05.unet import SelfAttention

NETWORK = {
    "channels": 8,
    "multipliers": [1, 2, 2],
    "num_blocks": 1,
    "attention_resolutions": [8, 7],
    "num_heads": 1,
    "dropout": 0.0,
    "num_groups": 4,
}


@pytest.fixture
def tiny(monkeypatch) -> None:
    """Every preset's network is a small one, and so are the matrices."""
    monkeypatch.setattr(bench, "matrix_peak", partial(bench.matrix_peak, size=256))
    for module in (bench, parts):
        monkeypatch.setattr(module, "preset", lambda name: NETWORK)


# The scoreboard


def test_the_rows_are_those_of_the_lessons():
    """Every row names a sampler that its checkpoint's lesson can do, and a file of that lesson."""
    assert len(scoreboard.ROWS) == 20
    for name, row in scoreboard.ROWS.items():
        file = ROOT / row.checkpoint
        assert file.parent.name == "pretrained"
        assert file.parent.parent.is_dir()
        if file.exists():
            _, model, content = lessons.load(str(file), None, lessons.EVERY)
            assert content["dataset"] == "mnist"
            if row.guidance != 1:
                assert hasattr(model, "bind"), name


@pytest.fixture
def board(monkeypatch, tmp_path):
    """The scoreboard on scikit-learn's digits, with a place of its own to store."""
    data = mnist.load("digits")
    monkeypatch.setattr(scoreboard.mnist, "load", lambda *_: data)
    reference = Reference(data, torch.device("cpu"))
    monkeypatch.setattr(scoreboard, "Reference", lambda *_: reference)
    monkeypatch.setattr(scoreboard, "STORED", tmp_path / "stored")

    def run(*words: str) -> str:
        flags = ["--num_samples", "66", "--num_images", "0", "--device", "cpu"]
        folder = tmp_path / "rows"
        cli.run(scoreboard.main, [*flags, "--output_dir", str(folder), *words])
        return (folder / "table.md").read_text()

    return run


def test_a_row_is_measured_compared_and_kept(board, capsys, tmp_path, monkeypatch):
    rows = ("--rows", "real", "ddim_10", "vlb_10")
    monkeypatch.setitem(
        scoreboard.ROWS, "vlb_10", scoreboard.ROWS["vlb_10"]._replace(checkpoint="missing.pt")
    )
    table = board(*rows)
    out = capsys.readouterr().out
    assert "nothing is stored to compare it with" in out
    assert "left out: there is no missing.pt" in out
    header, _, real, ddim, *rest = table.splitlines()
    assert header.count("|") == real.count("|") == ddim.count("|")
    assert "real training images" in real
    assert "DDPM, sampled by DDIM" in ddim
    assert "Not measured:" in rest[-1]
    assert "vlb_10" in rest[-1]
    for name in ("real", "ddim_10"):
        assert (tmp_path / "rows" / name / "strip.png").exists()

    stored = json.loads((tmp_path / "rows" / "results.json").read_text())
    (tmp_path / "stored").mkdir()
    scoreboard.write(tmp_path / "stored" / "results.json", stored)
    assert board(*rows) == table
    out = capsys.readouterr().out
    assert out.count("as stored") == 2
    assert "as measured before" in out

    stored["ddim_10"]["fid"] *= 1.1
    scoreboard.write(tmp_path / "stored" / "results.json", stored)
    board(*rows)
    assert "moved: fid from" in capsys.readouterr().out


def test_what_is_stored_stands_in_the_readme_between_its_markers(board, tmp_path, monkeypatch):
    monkeypatch.setattr(scoreboard, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- scoreboard -->\nold\n<!-- /scoreboard -->\nafter\n")
    board("--rows", "real")
    measured = json.loads((tmp_path / "rows" / "results.json").read_text())["real"]
    (tmp_path / "stored").mkdir()
    scoreboard.write(tmp_path / "stored" / "results.json", {"ddim_10": measured})
    board("--rows", "real", "--store", "true")
    text = readme.read_text()
    assert text.startswith("before\n<!-- scoreboard -->\n| model |")
    assert text.endswith("<!-- /scoreboard -->\nafter\n")
    assert "old" not in text
    assert "benchmarks/scoreboard/real.png" in text
    assert (tmp_path / "stored" / "real.png").exists()
    # what was not measured this time stays
    assert list(scoreboard.read(tmp_path / "stored" / "results.json")) == ["ddim_10", "real"]
    assert "sampled by DDIM" in text


def test_the_readme_has_a_place_for_the_table():
    text = (ROOT / "README.md").read_text()
    first, last = (text.index(marker) for marker in scoreboard.MARKERS)
    assert first < last


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(scoreboard.main, ["--rows", "ddim_11"])
    assert stop.value.code == 2
    assert "row ddim_11 is not known: take some of dpm, ddpm" in capsys.readouterr().err


# Beside other libraries


def test_diffusers_network_has_lesson_5s_shape():
    pytest.importorskip("diffusers")
    for size in (28, 32):
        ours = contenders.lesson_5(NETWORK, 1, size).model
        theirs = contenders.diffusers(NETWORK, 1, size).model
        assert contenders.count(ours) == contenders.count(theirs)
    with pytest.raises(UserError, match="num_heads 1"):
        contenders.unet2d({**NETWORK, "num_heads": 2}, 1, 28)


def test_denoising_diffusions_network_is_of_lesson_5s_size():
    pytest.importorskip("denoising_diffusion_pytorch")
    for name in ("paper", "laptop"):
        network = contenders.preset(name)
        with torch.device("meta"):
            ours = contenders.lesson_5(network, 1, 32).model
            theirs = contenders.unet(network, 1, 32)
        assert 0.8 < contenders.count(theirs) / contenders.count(ours) < 1.25, name


def test_every_contender_trains_and_steps_back():
    pytest.importorskip("diffusers")
    pytest.importorskip("denoising_diffusion_pytorch")
    xt = torch.randn(2, 1, 32, 32)
    for contender in contenders.contenders(NETWORK, 1, 32):
        contender.to(torch.device("cpu"))
        step = bench.step_of_training(contender, 2, "float32", torch.device("cpu"))
        before = [p.detach().clone() for p in contender.model.parameters()]
        step()
        step()
        after = list(contender.model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        with torch.no_grad():
            assert contender.step_back(xt, 1000).shape == xt.shape
            assert torch.isfinite(contender.step_back(xt, 1)).all(), contender.name


def test_times_are_medians_taken_in_turn(monkeypatch):
    durations = [100, 100, 1, 1, 2, 2, 3, 3]  # the first round is slow, and does not count
    order, clock = [], iter([moment for d in durations for moment in (0, d)])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    tasks = {name: lambda name=name: order.append(name) for name in "ab"}
    assert timing.in_turn(tasks, 3, "") == {"a": 2, "b": 2}
    assert order == list("abababab")
    times = {("lesson 5", "float32", "x"): 2.0, ("lesson 5", "bfloat16", "x"): 1.0}
    times |= {("other", "float32", "x"): 3.0, ("other", "bfloat16", "x"): 4.0}
    result = timing.compared(times, 8)
    assert result["ratio"]["other, best"] == 3.0  # their best is float32
    assert result["ratio"]["other, bfloat16"] == 4.0
    assert result["images_per_second"]["lesson 5, bfloat16, x"] == 8.0


@pytest.mark.usefixtures("tiny")
def test_the_bench_writes_its_report(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("denoising_diffusion_pytorch")
    flags = ["--batch_size", "2", "--repeats", "1", "--whole_repeats", "1", "--num_samples", "1"]
    flags += ["--num_steps", "25", "--device", "cpu", "--output_dir", str(tmp_path)]
    parts = ["--parts", "training", "sampling", "bookkeeping", "attention", "whole"]
    cli.run(bench.main, [*flags, *parts])
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
    assert "Where its time goes" in text
    assert "- laptop, 7x7, " in text.split("the fused one takes:")[1]


def test_the_fused_attention_is_lesson_5s():
    written_out, fused = (
        kind(8, num_heads=2, num_groups=4) for kind in (SelfAttention, parts.FusedAttention)
    )
    torch.nn.init.normal_(written_out.out.weight)
    fused.load_state_dict(written_out.state_dict())
    h = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(fused(h), written_out(h))
    assert (fused(h) - h).abs().max() > 0.1


def test_the_time_of_a_step_is_shared_out_by_kind_of_operation():
    a, h = torch.randn(300, 300), torch.randn(4, 16, 32, 32)
    conv, norm = torch.nn.Conv2d(16, 16, 3), torch.nn.GroupNorm(1, 16)
    steps = {
        "matrix products": lambda: [a @ a for _ in range(9)],
        "convolutions": lambda: conv(h).sum().backward(),
        "group norms": lambda: [norm(h) for _ in range(9)],
    }
    for kind, step in steps.items():
        spent = parts.shares(step, torch.device("cpu"))
        assert sum(spent.values()) == pytest.approx(1)
        assert next(iter(spent)) == kind, spent


def test_before_and_after_are_measured_by_turns(tmp_path, monkeypatch):
    folder = tmp_path / "old"
    for package in ("common", "lesson_05"):
        unwanted = shutil.ignore_patterns("__py*", "output")
        shutil.copytree(ROOT / package, folder / package, ignore=unwanted)
    process = folder / "lesson_05" / "ddpm.py"
    slow = "def loss(self, *a):\n        __import__('time').sleep(1)\n"
    slow += "        return self.quick(*a)\n\n"
    process.write_text(process.read_text().replace("def loss(", slow + "    def quick("))
    monkeypatch.setattr(before, "lay_out", lambda commit, place: folder)
    flags = ["--commit", "old", "--networks", "laptop", "--repeats", "1", "--steps", "1"]
    cli.run(before.main, [*flags, "--device", "cpu", "--output_dir", str(tmp_path / "out")])
    seconds = json.loads((tmp_path / "out" / "before.json").read_text())["seconds"]
    slowed = seconds["before"]["laptop, training"]
    assert slowed > 1
    assert slowed - seconds["after"]["laptop, training"] > 0.5
    assert slowed - seconds["before"]["laptop, sampling"] > 0.5
    assert "| laptop preset, 64 images, sampling |" in (tmp_path / "out" / "before.md").read_text()


def test_a_commit_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="commit 'nowhere' cannot be laid out"):
        before.lay_out("nowhere", tmp_path / "new")


def test_networks_that_one_of_the_three_cannot_have_are_refused():
    pytest.importorskip("diffusers")
    pytest.importorskip("denoising_diffusion_pytorch")
    from benchmarks import quality_race

    data = mnist.load("digits")
    quality_race.must_build(NETWORK, data)
    for change in ({"foo": 1}, {"num_heads": 2}):
        with pytest.raises(UserError):
            quality_race.must_build(NETWORK | change, data)


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r benchmarks/requirements\.txt"):
        contenders.needed()


def test_memory_is_that_of_a_process_of_its_own():
    pytest.importorskip("diffusers")
    pytest.importorskip("denoising_diffusion_pytorch")
    ballast = torch.ones(3 * 10**8)  # 1.2 GB of this process, not of that one
    measured = bench.memory("laptop", 1, torch.device("cpu"))
    assert len(measured) == 3
    for gigabytes in measured.values():
        assert 0.1 < gigabytes < ballast.nbytes / 1e9


@pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data")
def test_a_race_trains_three_and_shows_them_side_by_side(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip("denoising_diffusion_pytorch")
    from benchmarks import quality_race

    monkeypatch.setattr(quality_race, "FEW", 2)
    small = {"channels": 4, "multipliers": [1, 1, 1], "attention_resolutions": [7]}
    quality_race.main(
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
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        *quality_race.RACERS,
        "real training images",
    ]
    assert len({row.count("|") for row in rows}) == 1
