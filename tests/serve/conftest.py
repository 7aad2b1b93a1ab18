"""Adapters to be served, made once for each file of tests."""

from pathlib import Path

import pytest

from live_server import embedded


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    embedded(folder)
    return folder
