"""`s2ft base` writes a folder that trains; bad input leaves nothing behind."""

import json
from pathlib import Path

import pytest

pytest.importorskip("gguf")

from gguf_base import write_base
from s2ft.demo import base_path
from s2ft.runtime.models import empty_model


def test_a_file_becomes_a_folder(tmp_path: Path, s2ft) -> None:
    write_base(base_path(), tmp_path / "base.gguf", vocabulary=True)
    file, output, summary = (str(tmp_path / name) for name in ("base.gguf", "model", "s.json"))
    code, out, err = s2ft("base", file, "--output", output, "--json", summary)
    assert code == 0, err
    assert "dequantised to float32" in out
    assert empty_model(output).config.num_hidden_layers == 4
    assert json.loads(Path(summary).read_text())["output"] == output


@pytest.mark.parametrize(("name", "reason"), [("./nowhere.gguf", "nowhere.gguf"), (str(base_path()), "no GGUF file")])
def test_what_is_no_gguf_is_refused(tmp_path: Path, s2ft, name: str, reason: str) -> None:
    code, _, err = s2ft("base", name, "--output", str(tmp_path / "model"))
    assert code == 2
    assert reason in err
    assert not (tmp_path / "model").exists()
