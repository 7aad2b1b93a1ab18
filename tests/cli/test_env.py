"""`s2ft env`: versions, machine and extras, and nothing about whose machine it is."""

import getpass
import json
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml

from s2ft.common import extras
from s2ft.common.extras import what_extras_lack

NEEDS = [
    "torch>=2.11",
    'numpy>=2; extra == "train"',
    's2ft[train]; extra == "eval"',
    'lm-eval>=0.4.13; extra == "eval"',
    's2ft[eval,gguf]; extra == "all"',
    'gguf>=0.17; extra == "gguf"',
    "triton>=3.5; platform_system == 'Linux' and extra == 'gpu'",
]


def test_it_prints_what_it_writes_and_names_nobody(s2ft, tmp_path: Path) -> None:
    code, printed, _ = s2ft("env", "--json", str(tmp_path / "env.json"))
    facts = json.loads((tmp_path / "env.json").read_text())
    lines = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in printed.splitlines()}
    assert code == 0
    assert lines["torch"] == facts["torch"] == version("torch")
    assert "bf16" in lines["precision"]
    assert lines["extra train"] == "complete"
    assert [name for name in lines if name.startswith("extra ")] == [f"extra {name}" for name in facts["extras"]]
    assert {"eval", "lab", "serve", "gguf", "gpu", "dev"} < facts["extras"].keys()
    for private in (str(Path.home()), str(Path.cwd()), socket.gethostname(), f" {getpass.getuser()} "):
        assert private not in printed


def test_each_extra_says_what_it_lacks_and_what_those_lack_that_it_includes(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(package: str) -> str:
        if package in ("lm-eval", "triton"):
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(extras, "requires", lambda _: NEEDS)
    monkeypatch.setattr(extras, "version", installed)
    assert what_extras_lack() == {"train": [], "eval": ["lm-eval"], "all": ["lm-eval"], "gguf": [], "gpu": ["triton"]}


def test_the_issue_template_asks_for_it() -> None:
    template = yaml.safe_load((Path(__file__).parents[2] / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    assert any("`s2ft env`" in field["attributes"]["description"] for field in template["body"])
