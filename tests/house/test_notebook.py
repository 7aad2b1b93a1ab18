"""The notebook runs as it stands, on less data: its cells in order, in this process."""

import json
from pathlib import Path
from typing import Any

import pytest

from s2ft.adapters.file import read_adapter

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.mark.usefixtures("one_thread")
def test_its_cells_run_in_order_and_leave_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)  # kept without results
    texts = ["".join(cell["source"]) for cell in cells]
    given = "EXAMPLES, EPOCHS = 1000, 4"
    assert given in texts[0]
    names: dict[str, Any] = {"__name__": "__main__"}
    for text in texts:
        exec(compile(text.replace(given, "EXAMPLES, EPOCHS = 256, 2"), NOTEBOOK.name, "exec"), names)
    assert names["losses"][-1] < names["losses"][0]
    assert names["before"] != names["after"]
    assert any(bool(delta.any()) for delta in read_adapter(tmp_path / "runs" / "notebook" / "river").deltas.values())
