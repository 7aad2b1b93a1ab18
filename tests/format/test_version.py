"""Format versions of adapters, by the config alone; through every reader: tests/attacks/test_fuzz_adapters.py."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file

from adapter_files import CONFIG, WEIGHTS, edit
from families import build
from s2ft import S2FTConfig, S2FTError, fuse
from s2ft.format.config_file import FORMAT_VERSION

MAJOR, MINOR = map(int, FORMAT_VERSION.split("."))
NEWER = f"{MAJOR}.{MINOR + 1}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "a"
    get_peft_model(build("llama", torch.float32), S2FTConfig(ratios=0.3, init_weights=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "a")


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("peft.config.hf_hub_download", lambda *_, **__: str(folder / CONFIG))
    return "someone/adapter"


def unversioned(folder: Path) -> dict[str, object]:
    fields = json.loads((folder / CONFIG).read_text())
    del fields["format_version"]
    (folder / CONFIG).write_text(json.dumps(fields))
    return fields


def test_what_saves_an_adapter_writes_the_version_and_nothing_else_new(folder: Path, tmp_path: Path) -> None:
    assert json.loads((folder / CONFIG).read_text())["format_version"] == FORMAT_VERSION
    before = unversioned(folder)
    fuse([folder], output=tmp_path / "fused")
    after = json.loads((tmp_path / "fused" / CONFIG).read_text())
    assert {**before, "format_version": FORMAT_VERSION} == after
    assert (tmp_path / "fused" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_an_adapter_from_before_versions_is_the_same_config(folder: Path) -> None:
    today = S2FTConfig.from_pretrained(str(folder))
    unversioned(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert S2FTConfig.from_pretrained(str(folder)) == today


def test_a_newer_minor_version_is_read_without_the_keys_that_it_added(folder: Path, tmp_path: Path) -> None:
    today = S2FTConfig.from_pretrained(str(folder))
    edit(folder, format_version=NEWER, shiny=3)
    with pytest.warns(UserWarning, match=rf"'{NEWER}' is newer than .*\['shiny'\]\. Upgrade s2ft"):
        config = S2FTConfig.from_pretrained(str(folder))
    assert (config.slices, config.checksums, config.format_version) == (today.slices, today.checksums, NEWER)
    config.save_pretrained(str(tmp_path / "again"))
    again = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert again["format_version"] == FORMAT_VERSION, "what is written is of today's format"
    assert "shiny" not in again
    assert load_file(folder / WEIGHTS)


def test_a_newer_major_version_is_refused_whatever_else_it_holds(folder: Path) -> None:
    edit(folder, format_version="2.1", shiny=3, slices="another form")
    with pytest.raises(
        S2FTError, match=r"adapter_config\.json: format_version='2\.1' is newer.*upgrade s2ft"
    ) as caught:
        S2FTConfig.from_pretrained(str(folder))
    assert len(caught.value.problems) == 1
    with pytest.raises(S2FTError, match="upgrade s2ft"), pytest.warns(UserWarning, match="shiny"):
        PeftConfig.from_pretrained(str(folder))


def test_files_on_the_hub_follow_the_same_rule(hub: str, folder: Path) -> None:
    edit(folder, format_version=NEWER, shiny=3)
    with pytest.warns(UserWarning, match="Upgrade s2ft"):
        assert S2FTConfig.from_pretrained(hub).format_version == NEWER
    edit(folder, format_version="2.0")
    with pytest.raises(S2FTError, match="upgrade s2ft"):
        S2FTConfig.from_pretrained(hub)


@pytest.mark.parametrize("version", [None, 1, 1.0, "1", "one.two", "1.0.0", "-1.0", "1.", ["1.0"], "9" * 9999 + ".0"])
def test_what_is_no_version_is_refused(version: object, folder: Path) -> None:
    edit(folder, format_version=version)
    with pytest.raises(S2FTError, match=r"is no format version; expected MAJOR\.MINOR"):
        S2FTConfig.from_pretrained(str(folder))
