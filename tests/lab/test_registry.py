"""The tables of benchmarks and studies agree with the modules that they name."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from s2ft import S2FTError
from s2ft.cli.app import app
from s2ft.lab.registry import BENCHMARKS, STUDIES


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_takes_its_options_and_draws_if_it_says_so(name: str) -> None:
    entry, module = BENCHMARKS[name], import_module(f"s2ft.lab.bench.{name}")
    arguments = inspect.signature(getattr(module, f"bench_{name}")).parameters
    assert {"tell", *entry.options} <= set(arguments)
    assert all(each.default is not inspect.Parameter.empty for each in arguments.values())
    assert hasattr(module, f"draw_{name}") == entry.has_picture


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_takes_its_options_and_counts_its_runs(name: str) -> None:
    module = import_module(f"s2ft.lab.study.{name}")
    arguments = list(inspect.signature(getattr(module, f"study_{name}")).parameters)
    assert arguments == ["folder", "settings", "tell", *STUDIES[name].options]
    settings = getattr(module, f"{name.capitalize()}Settings")
    assert settings(seeds=2).runs > settings(seeds=1).runs


@pytest.mark.parametrize(
    ("command", "name"), [*(("bench", name) for name in BENCHMARKS), *(("study", name) for name in STUDIES)]
)
def test_the_example_in_the_help_is_accepted(command: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = (BENCHMARKS if command == "bench" else STUDIES)[name]
    _, _, example = entry.described(command, name).rpartition("Example: s2ft ")
    parser = get_command(app)
    for word in (command, name):
        parser = parser.commands[word]
    options = parser.make_context(name, example.split()[2:]).params
    work = _FIRST_WORK.get(name) if command == "bench" else None
    if work is None:
        return
    monkeypatch.setattr(f"s2ft.lab.bench.{name}.{work}", _begun)
    with pytest.raises(_BegunError):
        getattr(import_module(f"s2ft.lab.bench.{name}"), f"bench_{name}")(
            **{key: options[key] for key in entry.options}
        )


class _BegunError(Exception):
    """The work of a benchmark would begin here."""


def _begun(*_: object) -> None:
    raise _BegunError


_FIRST_WORK = {"training": "frozen_base", "families": "_Kept"}
"""Benchmarks that refuse options which do not go together → what they call first once all is accepted."""


@pytest.mark.parametrize(
    "words", [*(f"bench {name}" for name in BENCHMARKS), *(f"study {name} --data d --model m" for name in STUDIES)]
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(words: str, tmp_path: Path) -> None:
    command, name, *own = words.split()
    own = [word for option, value in zip(own[::2], own[1::2], strict=True) for word in _taken(name, option, value)]
    result = CliRunner().invoke(app, [command, name, *own, "--json", str(tmp_path)])
    assert isinstance(result.exception, S2FTError)
    assert str(result.exception) == f"json={str(tmp_path)!r} is a folder; name a file"


def _taken(study: str, option: str, value: str) -> list[str]:
    return [option, value] if option.removeprefix("--") in STUDIES[study].options else []
