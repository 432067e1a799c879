"""Small data that many tests share, made once a session by the product's own commands."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from data.store.layout import Store
from data.store.opening import open_store
from data.synthetic.recipe import Recipe
from data.synthetic.synthesize import synthesize
from data.wind_scan.cache import ScanCache, build

torch.set_num_threads(1)
# `make test &` and nohup ignore these, what they start inherits it, and a run then rightly does not hear them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TINY = Recipe(days=16, rows=16, cols=32, seed=3, missing=0.01, shard_hours=48, train=0.6, validation=0.2)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.zarr"
    synthesize(path, TINY)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Store:
    return open_store(tiny_path)


@pytest.fixture(scope="session")
def tiny_scan(tiny: Store) -> ScanCache:
    return build(tiny, tiny.path.with_suffix(".wind_scan"), patch=2, regions=(4, 4), sectors=16)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="skip what starts a process, when it is about to")


@pytest.fixture(autouse=True, scope="session")
def _no_process_when_fast(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--fast"):
        yield
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(subprocess.Popen, "__init__", lambda *_, **__: pytest.skip("starts a process"))
        yield
