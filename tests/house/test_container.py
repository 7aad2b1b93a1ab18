"""The Dockerfile, as far as it can be read without Docker; `make lint-container` asks hadolint too."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.main import get_command

from s2ft import S2FTError
from s2ft.cli.app import app
from s2ft.demo import base_path
from s2ft.serve.options import ServeOptions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STAGES = dict(re.findall(r"^FROM \S+ AS (\w+)\n((?:(?!FROM ).*\n)*)", TEXT, re.MULTILINE))


def instruction(name: str, stage: str) -> str:
    (found,) = re.findall(rf"^{name} (.*)$", STAGES[stage], re.MULTILINE)
    return str(found)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_default_command_serves(target: str) -> None:
    assert json.loads(instruction("ENTRYPOINT", target)) == ["s2ft"]
    command, flag, host = json.loads(instruction("CMD", target))
    assert command in get_command(app).commands
    assert (flag, instruction("EXPOSE", target)) == ("--host", str(ServeOptions.model_fields["port"].default))
    with pytest.raises(S2FTError, match="needs keys"):  # which the container is given; else it says so and ends
        ServeOptions.parse({"model": str(base_path()), "host": host})


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_it_runs_as_a_user_without_rights_and_installs_extras_that_exist(target: str) -> None:
    user, group = instruction("USER", target).split(":")
    assert int(user) == int(group) == int(re.findall(r"--uid (\d+)", STAGES["base"])[0]) != 0
    (extras,) = re.findall(r"s2ft-\*\.whl\)\[([\w,]+)\]", STAGES[target])
    assert {"serve", "gguf"} <= set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_its_python_is_one_that_is_supported_and_all_that_the_build_reads_is_sent() -> None:
    versions = set(re.findall(r"^FROM python:(\d+\.\d+)-slim", TEXT, re.MULTILINE))
    assert all(Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version) for version in versions)
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", TEXT, re.MULTILINE) for name in line.split()}
    assert sent == copied
    assert all((ROOT / name).exists() for name in copied)
