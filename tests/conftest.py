"""Every test starts from a fresh, recorded seed: inputs are new each run, and a failure can be repeated with --seed."""

import gc
import json
import os
import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from s2ft.cli.app import main
from tiny_base import save_tiny_base


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of the random inputs, printed when a test fails")
    parser.addoption("--soak", action="store_true", help="attacks (`soak` tests) at full length: see `make test-soak`")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is loaded by now stays; else each full collection of garbage would walk through all of torch and transformers."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--seed")
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    request.node.add_report_section("setup", "seed", f"--seed {seed}")


@pytest.fixture
def tries(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How often an attack is tried: `tries(few, many)` is `few` in the suite, `many` in `make test-soak`."""
    return lambda few, many: many if request.config.getoption("--soak") else few


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random model."""
    return str(save_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of 40 examples, no two alike."""
    rng = random.Random(0)
    rows = [
        {"prompt": f"{n}+{rng.randrange(10)}=", "completion": f"{rng.randrange(20)}, which is the sum"}
        for n in range(40)
    ]
    path = tmp_path_factory.mktemp("data") / "sums.json"
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture
def s2ft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["s2ft", *words])
        with pytest.raises(SystemExit) as left:
            main()
        return (int(left.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small models, whose threads would only wait for each other; and for results that repeat bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
