"""Every test starts from a fresh, recorded seed: inputs are new each run, and a failure can be repeated with --seed."""

import os
import random
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of the random inputs, printed when a test fails")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--seed")
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    torch.manual_seed(seed)
    request.node.add_report_section("setup", "seed", f"--seed {seed}")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small models, whose threads would only wait for each other; and for results that repeat bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
