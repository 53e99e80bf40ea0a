"""Fixtures that several tests share: real digits, a tiny run, and a web server."""

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from common.data import Images, load_images

import pytest
import torch
from helpers import train
from server import Server


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def real_mnist() -> Images:
    """Real MNIST, from the folder that DIFFUSION_DATA names."""
    if not os.environ.get("DIFFUSION_DATA"):
        pytest.skip("needs real MNIST: set DIFFUSION_DATA to its folder")
    return load_images("mnist")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny finished run of lesson 5."""
    return train(tmp_path_factory.mktemp("trained") / "run")


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
