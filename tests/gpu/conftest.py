"""The tests of this folder run on a GPU (`make test-gpu`); without one they are skipped."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from on_gpu import DEVICE, IS_CUDA

REASON = "no CUDA GPU here; S2FT_GPU_TESTS_DEVICE=cpu runs these tests on the CPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if IS_CUDA and not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """float32 products as they are, not in TensorFloat-32; and a fault in a kernel shows in the test that started it."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    if IS_CUDA:
        torch.cuda.synchronize(DEVICE)
