"""What all tests of training runs leave out."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s2ft.finetune import card


@pytest.fixture(autouse=True)
def light() -> Iterator[None]:
    """Runs of a few steps draw no loss curve and wait for no disk, both of which would take longer than the steps."""

    def draw(curve: Any, path: Path, unit: str) -> None:
        path.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "_draw", draw)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
