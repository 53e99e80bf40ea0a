"""What the tests share: real digits, tiny runs, and a server."""

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from common import mnist
from common.run import RunOptions
from lesson_05 import train_mnist

ROOT = Path(__file__).resolve().parent.parent
NETWORK = {
    "channels": 8,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [14],
    "num_groups": 4,
    "dropout": 0.1,
}


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def real_mnist() -> mnist.Images:
    """Real MNIST, from the folder that DIFFUSION_DATA names."""
    if not os.environ.get("DIFFUSION_DATA"):
        pytest.skip("needs real MNIST: set DIFFUSION_DATA to a folder that holds it")
    return mnist.load("mnist")


def train(folder: Path, **changes: object) -> Path:
    """A tiny run of lesson 5 on scikit-learn's digits; returns its folder."""
    run = {"output_dir": str(folder), "device": "cpu", "precision": "float32"}
    names = set(RunOptions.__dataclass_fields__)
    run |= {name: changes.pop(name) for name in names & changes.keys()}
    run = {"log_every": 5, "num_previews": 2} | run
    arguments = {
        "dataset": "digits",
        "network": NETWORK,
        "num_timesteps": 60,
        "num_training_steps": 4,
        "batch_size": 8,
        "num_warmup_steps": 2,
        "num_samples": 2,
        **changes,
    }
    train_mnist.main(**arguments, options=RunOptions(**run))
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny finished run of lesson 5."""
    return train(tmp_path_factory.mktemp("trained") / "run")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; a path with "hangs" is never answered, one with "half" is cut."""

    files: ClassVar[dict[str, bytes]] = {}
    released = threading.Event()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if "hangs" in self.path:
            self.released.wait(30)
            return
        body = self.files.get(self.path.rsplit("/", 1)[-1])
        self.send_response(200 if body is not None else 404)
        body = body or b"<html>not here</html>"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if "half" in self.path else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    server.block_on_close = False
    Server.released.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    Server.released.set()
    server.shutdown()
