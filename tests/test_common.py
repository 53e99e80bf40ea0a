"""The plumbing: data, checkpoints, resuming, and what happens to bad input."""

import csv
import gzip
import hashlib
import os
import pickle
import platform
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common.run import RunOptions
from conftest import NETWORK, ROOT, Server, train
from PIL import Image
from torch import Tensor

from common import checkpoint, cli, images, mnist
from common.errors import UserError
from lesson_05 import sample_mnist, train_mnist
from lesson_05.ddpm import DDPM

# Data


def idx(array: np.ndarray) -> bytes:
    """uint8 values in the IDX format of MNIST."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def small_mnist() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for part, count in [("train", 12), ("t10k", 6)]:
        files[f"{part}-images-idx3-ubyte"] = idx(random.integers(0, 256, (count, 28, 28)))
        files[f"{part}-labels-idx1-ubyte"] = idx(np.arange(count) % 10)
    return files


@pytest.fixture
def folder_of_mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in small_mnist().items():
        (raw / name).write_bytes(content)
    return tmp_path / "data"


def test_real_mnist_keeps_its_size_and_its_levels(real_mnist):
    assert real_mnist.train.shape == (60_000, 1, 28, 28)
    assert real_mnist.test.shape == (10_000, 1, 28, 28)
    assert real_mnist.train.dtype == torch.uint8
    assert real_mnist.train_labels.bincount().tolist()[:3] == [5923, 6742, 5958]
    assert real_mnist.train.float().mean().item() == pytest.approx(33.318, abs=0.01)


def test_levels_survive_the_way_to_minus_one_and_one():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x0 = images.from_uint8(levels)
    assert (x0.min(), x0.max()) == (-1, 1)
    assert torch.equal(images.to_uint8(x0), levels)


def test_digits_are_the_offline_data():
    data = mnist.load("digits")
    assert data.shape == (1, 28, 28)
    assert len(data.train) + len(data.test) == 1797
    image = data.train[0, 0]
    assert (image[2:26:3, 2:26:3] == image[4:26:3, 3:26:3]).all()  # each pixel three times
    assert not image[:2].any()
    assert set(data.train.unique().tolist()) == {round(255 * v / 16) for v in range(17)}


def test_batches_depend_on_seed_and_step_alone():
    pool = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    labels = torch.arange(10)
    one, other = (mnist.Batches(pool, labels, 4, 3, torch.device("cpu")) for _ in range(2))
    walked = [one[step][1].tolist() for step in range(1, 7)]
    assert [other[step][1].tolist() for step in (6, 2, 5)] == [walked[5], walked[1], walked[4]]
    for first in (0, 2, 4):  # two batches an epoch, without repetition
        assert len({*walked[first], *walked[first + 1]}) == 8
    assert walked[:2] != walked[2:4]
    for seed in (4, 10**18):
        another = mnist.Batches(pool, labels, 4, seed, torch.device("cpu"))
        assert [another[step][1].tolist() for step in range(1, 7)] != walked
    x0, label = one[1]
    assert torch.equal(images.to_uint8(x0).flatten().long(), label)


@pytest.fixture
def mirror(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    Server.files = {f"{name}.gz": gzip.compress(body) for name, body in small_mnist().items()}
    sums = [(name, hashlib.md5(body).hexdigest()) for name, body in Server.files.items()]
    order = ["train-images", "train-labels", "t10k-images", "t10k-labels"]
    sums.sort(key=lambda pair: [name in pair[0] for name in order].index(True))
    monkeypatch.setattr(mnist.datasets.MNIST, "resources", sums)
    monkeypatch.setattr(mnist, "TIMEOUT", 0.5)
    return address


def test_download_gives_up_a_silent_mirror_for_the_next(mirror, tmp_path, monkeypatch, capsys):
    mirrors = [f"{mirror}/hangs/", f"{mirror}/"]
    monkeypatch.setattr(mnist.datasets.MNIST, "mirrors", mirrors)
    data = mnist.load("mnist", tmp_path)
    assert len(data.train) == 12
    assert "Downloading mnist" in capsys.readouterr().out
    Server.files = {}  # the second time nothing is asked of it
    assert torch.equal(mnist.load("mnist", tmp_path).train, data.train)


def test_a_download_with_another_sum_is_refused(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist.datasets.MNIST, "mirrors", [f"{mirror}/"])
    Server.files = {name: body + b"x" for name, body in Server.files.items()}
    with pytest.raises(UserError, match="could not be downloaded"):
        mnist.load("mnist", tmp_path)


def test_without_network_auto_takes_the_digits_and_mnist_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mnist.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert mnist.load("auto", tmp_path).name == "digits"
    said = " ".join(capsys.readouterr().out.split())
    assert "MNIST is not in" in said
    assert "Connection refused" in said
    assert "scikit-learn" in said
    with pytest.raises(UserError, match="--data_dir"):
        mnist.load("mnist", tmp_path)


def test_data_come_from_the_flag_then_the_variable(folder_of_mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("DIFFUSION_DATA", str(tmp_path / "nowhere"))
    assert len(mnist.load("auto", folder_of_mnist).train) == 12
    monkeypatch.setenv("DIFFUSION_DATA", str(folder_of_mnist))
    assert len(mnist.load("auto").train) == 12
    monkeypatch.delenv("DIFFUSION_DATA")
    assert mnist.default_folder() == ROOT / "data"


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08\x03", b"no IDX file at all", idx(np.zeros((12, 28, 28)))[:-1]]
)
def test_a_damaged_file_is_named(folder_of_mnist, content):
    path = folder_of_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(content)
    for dataset in ("auto", "mnist"):  # what is there but broken is never silently replaced
        with pytest.raises(UserError, match="train-images-idx3-ubyte is damaged"):
            mnist.load(dataset, folder_of_mnist)
    assert path.read_bytes() == content


def test_an_unreadable_file_is_named(folder_of_mnist):
    path = folder_of_mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte cannot be read"):
        mnist.load("mnist", folder_of_mnist)


def test_cifar10_has_three_channels(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    for name, count in [("data_batch_1", 20), ("test_batch", 4)]:
        levels = np.random.default_rng(1).integers(0, 256, (count, 3072), dtype=np.uint8)
        entry = {"data": levels, "labels": [k % 10 for k in range(count)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for file in folder.iterdir():
        sums[file.name] = hashlib.md5(file.read_bytes()).hexdigest()
    kind = mnist.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [("data_batch_1", sums["data_batch_1"])])
    monkeypatch.setattr(kind, "test_list", [("test_batch", sums["test_batch"])])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(kind, "meta", meta)
    data = mnist.load("cifar10", tmp_path)
    assert data.train.shape == (20, 3, 32, 32)
    entry = pickle.loads((folder / "data_batch_1").read_bytes())
    assert np.array_equal(data.train[3, 1, 0].numpy(), entry["data"][3, 1024 : 1024 + 32])
    train(tmp_path / "run", dataset="cifar10", data_dir=str(tmp_path), network=NETWORK | RES16)
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.mode == "RGB"
    (folder / "test_batch").write_bytes(b"x")
    with pytest.raises(UserError, match="cifar-10-batches-py is damaged"):
        mnist.load("cifar10", tmp_path)


RES16 = {"attention_resolutions": [16]}

# Training, stopping, resuming


def test_a_run_leaves_its_files(trained):
    names = {path.name for path in trained.iterdir()}
    pictures = {"samples.png", "reverse.png", "reverse.gif", "forward.png", "losses.png"}
    assert {"metrics.csv", "log.txt", "checkpoint_000004.pt", "samples_000004.png"} <= names
    assert pictures <= names
    assert "digits" in (trained / "log.txt").read_text()
    assert checkpoint.load(trained / "checkpoint_000004.pt")["dataset"] == "digits"
    header, row = (trained / "metrics.csv").read_text().splitlines()
    for column in ("loss", "loss_quarter_1", "loss_quarter_4", "held_out_loss", "grad_norm"):
        assert column in header.split(",")
    assert "learning_rate" in header
    assert "images_per_second" in header
    assert row.startswith("4,")
    with Image.open(trained / "reverse.gif") as gif:
        assert gif.n_frames > 30


def test_the_last_two_checkpoints_are_kept(tmp_path):
    train(tmp_path, num_training_steps=5, checkpoint_every=1)
    kept = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert kept == ["checkpoint_000004.pt", "checkpoint_000005.pt"]
    assert not list(tmp_path.glob(".*.part"))


def equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def without_speed(path: Path) -> list[str]:
    return [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_forty_steps_equal_twenty_a_signal_and_twenty(tmp_path, monkeypatch, capsys, number):
    settings = {"num_training_steps": 40, "decay_learning_rate": True, "log_every": 7}
    whole = train(tmp_path / "whole", **settings, num_samples=1)
    steps = iter(range(1, 41))
    update = train_mnist.Ema.update_parameters

    def update_and_signal(self, model):
        update(self, model)
        if next(steps) == 20:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train_mnist.Ema, "update_parameters", update_and_signal)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "parts", **settings, num_samples=1)
    assert stopped.value.code == 128 + number
    assert "--resume" in capsys.readouterr().out
    parts = tmp_path / "parts"
    assert (parts / "checkpoint_000020.pt").exists()
    with (parts / "metrics.csv").open("a") as log:
        log.write("35,9,9,9,9,9,9,9,9,9\n")  # as left by a run that was killed later on
    train(parts, **settings, num_samples=1, resume="latest")
    files = [folder / "checkpoint_000040.pt" for folder in (whole, parts)]
    one, other = (checkpoint.load(file) for file in files)
    assert equal(one, other)
    assert without_speed(whole / "metrics.csv") == without_speed(parts / "metrics.csv")
    assert (whole / "samples.png").read_bytes() == (parts / "samples.png").read_bytes()


def test_previews_do_not_change_the_training(tmp_path):
    often = train(tmp_path / "often", preview_every=1, log_every=1)
    never = train(tmp_path / "never", preview_every=100, log_every=100)
    one, other = (checkpoint.load(f / "checkpoint_000004.pt") for f in (often, never))
    assert equal(one["ema"], other["ema"])
    assert equal(one["training"]["rng"], other["training"]["rng"])


def test_the_network_trains_with_dropout_and_the_average_samples_without(tmp_path, monkeypatch):
    modes: dict[str, set[bool]] = {}
    loss = DDPM.loss

    def watched(self, model, *rest):
        modes.setdefault(type(model).__name__, set()).add(model.training)
        return loss(self, model, *rest)

    monkeypatch.setattr(DDPM, "loss", watched)
    train(tmp_path, preview_every=1, log_every=1)
    assert modes == {"UNet": {True}, "Ema": {False}}


def test_epochs_stand_for_steps(tmp_path):
    train(tmp_path, num_epochs=1, batch_size=500, network=NETWORK | {"channels": 4})
    assert (tmp_path / "checkpoint_000003.pt").exists()


def test_resume_takes_the_settings_of_the_run(tmp_path, capsys):
    train(tmp_path / "run", learning_rate=0.0123)
    words = ["--resume", "--num_training_steps", "6", "--output_dir", str(tmp_path / "run")]
    cli.run(train_mnist.main, words, presets=True, network=train_mnist.UNet)
    content = checkpoint.load(tmp_path / "run" / "checkpoint_000006.pt")
    assert content["config"]["learning_rate"] == 0.0123
    assert content["config"]["network"]["channels"] == 8
    assert "Going on from step 4" in capsys.readouterr().out


def test_resume_takes_another_learning_rate(tmp_path):
    rate = {"num_warmup_steps": 1, "log_every": 1, "checkpoint_every": 2}
    train(tmp_path, learning_rate=0.01, num_training_steps=2, **rate)
    train(tmp_path, learning_rate=0.001, num_training_steps=3, resume="latest", **rate)
    with (tmp_path / "metrics.csv").open() as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates == [0.01, 0.01, 0.001]
    training = checkpoint.load(tmp_path / "checkpoint_000003.pt")["training"]
    assert training["optimizer"]["param_groups"][0]["lr"] == 0.001


def test_steps_asked_for_count_more_than_the_epochs_of_the_run_to_resume(tmp_path):
    network = NETWORK | {"channels": 4}
    train(tmp_path, num_epochs=1, batch_size=750, network=network, num_samples=0)
    words = ["--resume", "--num_training_steps", "3", "--output_dir", str(tmp_path)]
    cli.run(train_mnist.main, words, presets=True, network=train_mnist.UNet)
    assert (tmp_path / "checkpoint_000003.pt").exists()


def test_the_last_line_is_a_command_for_the_folder_at_hand(tmp_path, monkeypatch, capsys):
    for here, script in [
        (ROOT, "lesson_05/sample_mnist.py"),
        (ROOT / "lesson_05", "sample_mnist.py"),
    ]:
        monkeypatch.chdir(here)
        train(tmp_path / here.name)
        last = capsys.readouterr().out.splitlines()[-1]
        assert f"python {script} --model_checkpoint" in last
        assert Path(script).is_file()


def test_what_could_not_be_loaded_again_is_not_trained(tmp_path):
    beta = {"num_timesteps": 2_000_000, "beta_1": 1e-9, "beta_T": 1e-9}
    with pytest.raises(UserError, match="num_timesteps is 2000000: that is more than any lesson"):
        train(tmp_path, **beta)
    with pytest.raises(UserError, match="the data's name is 'my-data'"):
        checkpoint.check_writable({}, "my-data")


def test_a_run_begins_with_the_weights_of_another(trained, tmp_path, capsys):
    file = str(trained / "checkpoint_000004.pt")
    changes = {"start_from": file, "learning_rate": 1e-12, "num_training_steps": 2}
    train(tmp_path / "run", seed=7, **changes)
    assert f"Beginning with {file}, trained for 4 steps" in capsys.readouterr().out
    given, ended = checkpoint.load(file), checkpoint.load(tmp_path / "run/checkpoint_000002.pt")
    assert ended["config"]["start_from"] == file
    for name, value in given["ema"].items():
        if name != "n_averaged":
            for weights in (ended["ema"][name], ended["training"]["model"][name[len("module.") :]]):
                torch.testing.assert_close(weights, value, rtol=0, atol=1e-9)
    changes |= {"num_training_steps": 3, "resume": str(tmp_path / "run/checkpoint_000002.pt")}
    train(tmp_path / "run", seed=7, **changes)  # as the line that says how to go on has it
    said = capsys.readouterr().out
    assert "Going on from step 2" in said
    assert "Beginning with" not in said
    with pytest.raises(UserError, match="another network than this run's flags describe"):
        train(tmp_path / "other", start_from=file, network=NETWORK | {"channels": 4})
    with pytest.raises(UserError, match=r"nowhere\.pt does not exist"):
        train(tmp_path / "none", start_from=str(tmp_path / "nowhere.pt"))


def test_a_step_takes_the_memory_of_the_one_before():
    """Without, each of these 400 MB would come page by page from the system: 100,000 faults."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only asked of glibc")
    code = """
import resource, torch
from common.device import pick_device
pick_device("cpu")
for _ in range(20):  # until it has found its places
    torch.ones(10**7)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10**7)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(run.stdout) < 5000, run.stderr


def test_a_loss_that_is_nan_stops_the_run_and_spares_the_checkpoint(tmp_path, monkeypatch):
    loss, calls = DDPM.loss, iter(range(100))

    def failing(self, model, x0, t, eps):
        losses = loss(self, model, x0, t, eps)
        return losses * float("nan") if model.training and next(calls) == 2 else losses

    monkeypatch.setattr(DDPM, "loss", failing)
    with pytest.raises(UserError, match=r"loss became nan at step 3.*checkpoint_000002\.pt"):
        train(tmp_path, checkpoint_every=1)
    content = checkpoint.load(tmp_path / "checkpoint_000002.pt")
    assert all(value.isfinite().all() for value in content["ema"].values())


# Sampling


def test_samples_come_from_the_checkpoint_alone(trained, tmp_path):
    file = str(trained / "checkpoint_000004.pt")
    for name, changes in [("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"clip_x0": False})]:
        sample_mnist.main(
            file, num_samples=3, save_npz=True, output_dir=str(tmp_path / name), **changes
        )
    samples = {p.parent.name: np.load(p)["samples"] for p in tmp_path.glob("*/samples.npz")}
    assert samples["a"].shape == (3, 1, 28, 28)
    assert samples["a"].dtype == np.uint8
    assert np.array_equal(samples["a"], samples["b"])
    assert not np.array_equal(samples["a"], samples["c"])
    assert not np.array_equal(samples["a"], samples["d"])


def test_variance_is_a_choice_of_the_sampler(trained):
    file = trained / "checkpoint_000004.pt"
    beta, tilde = (sample_mnist.load(file, v)[0] for v in ("beta", "beta_tilde"))
    assert sample_mnist.load(file)[0].log_var[5] == beta.log_var[5] > tilde.log_var[5]


# Bad input


def fails(capsys: pytest.CaptureFixture, main: object, *words: str, **groups: type) -> str:
    """Run a command line that must end with one line on standard error and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, [*map(str, words)], **groups)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    last = error.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in error
    return last


def training(capsys: pytest.CaptureFixture, folder: Path, *words: str) -> str:
    tiny = ["--config", "configs/laptop.yaml", "--dataset", "digits", "--network.channels", "8"]
    tiny += [
        "--num_training_steps",
        "1",
        "--num_timesteps",
        "60",
        "--num_samples",
        "1",
        "--num_previews",
        "1",
    ]
    tiny += ["--output_dir", str(folder)]
    network = train_mnist.UNet
    return fails(capsys, train_mnist.main, *tiny, *words, presets=True, network=network)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch_size", "0"], "batch_size is 0"),
        (["--batch_size", "1501"], "from 1 to 1,500"),
        (["--batch_size", "many"], "batch_size"),
        (["--batches", "3"], "--batches"),
        (["--batch", "3"], "--batch"),
        (["--network.num_groups", "3"], "divided into 3 groups"),
        (["--network.multipliers", "1", "1", "1", "1", "1", "1", "1"], "cannot be halved"),
        (["--num_training_steps", "0"], "num_training_steps is 0"),
        (["--num_samples", "-1"], "num_samples is -1"),
        (["--log_every", "0"], "log_every is 0"),
        (["--num_timesteps", "0"], "T = 0"),
        (["--learning_rate", "-1"], "learning_rate is -1"),
        (["--dataset", "svhn"], "svhn"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "cpu, cuda and mps are known"),
        (["--seed", "100000000000000000000"], "take 0 to 4,294,967,295"),
        (["--seed", "-1"], "take 0 to 4,294,967,295"),
        (["--precision", "float8"], "float8"),
        (["--config", "configs/none.yaml"], "configs/laptop.yaml, configs/paper.yaml"),
        (["--resume"], "no checkpoint to resume"),
    ],
)
def test_bad_flags_give_one_line(words, said, tmp_path, capsys):
    assert said in training(capsys, tmp_path / "run", *words)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_an_unknown_key_in_a_preset_is_named(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("batch_sizes: 3\n")
    assert "batch_sizes" in training(capsys, tmp_path, "--config", str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("batch_size: [3\n")
    training(capsys, tmp_path, "--config", str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("output_dir: elsewhere\n")
    said = training(capsys, tmp_path, "--config", str(tmp_path / "mine.yaml"))
    assert "sets output_dir: give it on the command line" in said


def test_flags_override_a_preset_wherever_they_stand(tmp_path, capsys):
    words = ["--num_training_steps", "7", "--config", "configs/laptop.yaml", "--print_config"]
    network = train_mnist.UNet
    with pytest.raises(SystemExit):
        cli.run(train_mnist.main, words, presets=True, network=network)
    assert "num_training_steps: 7\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # what is printed is a preset
        cli.run(train_mnist.main, ["--seed", "3", "--print_config"], presets=True, network=network)
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    words = ["--config", str(tmp_path / "mine.yaml"), "--print_config"]
    with pytest.raises(SystemExit):
        cli.run(train_mnist.main, words, presets=True, network=network)
    assert "seed: 3\n" in capsys.readouterr().out


def test_the_home_folder_may_be_written_short(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--num_samples", "1", "--output_dir=~/pictures", "--device", "cpu"]
    file = str(trained / "checkpoint_000004.pt")
    cli.run(sample_mnist.main, [*words, "--model_checkpoint", file])
    assert (tmp_path / "pictures" / "samples.png").exists()


def test_a_folder_with_a_run_is_refused_and_unharmed(trained, capsys):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    assert "holds a run already" in training(capsys, trained)
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in training(capsys, tmp_path / "file" / "run")


def test_no_code_names_a_device_or_a_machine():
    for path in [*ROOT.glob("common/*.py"), *ROOT.glob("lesson_*/**/*.py")]:
        text = path.read_text()
        assert ".cuda()" not in text, path
        assert '"cuda")' not in text, path
        assert "sys.path" not in text, path
        assert "num_workers" not in text, path


def test_options_of_every_run_are_flags(capsys):
    with pytest.raises(SystemExit):
        cli.run(train_mnist.main, ["--help"], presets=True, network=train_mnist.UNet)
    text = capsys.readouterr().out
    for name in [*RunOptions.__dataclass_fields__, "network.channels", "batch_size", "config"]:
        assert f"--{name}" in text
    with pytest.raises(SystemExit):
        cli.run(train_mnist.main, ["--print_config"], presets=True, network=train_mnist.UNet)
    assert "  channels: 16" in capsys.readouterr().out  # the preset's, not the default
