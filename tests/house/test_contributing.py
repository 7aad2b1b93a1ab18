"""CONTRIBUTING's recipes work: each is carried out on the library as it stands, and its test is run."""

import __future__

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest
from peft import get_peft_model
from typer.testing import CliRunner

from exported import save_adapter, save_base
from families import build
from s2ft import S2FTConfig, S2FTError, export, select
from s2ft.cli.app import app
from s2ft.evaluate import extraction, tasks
from s2ft.exports import targets
from s2ft.finetune import methods
from s2ft.finetune.options import parse_options
from s2ft.format.terms import STRATEGIES
from s2ft.lab import registry
from s2ft.selection import families, scores
from s2ft.selection.structure import find_structures

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (An? .+)\n((?:(?!^### ).*\n)+)", PAGE, re.MULTILINE))


def blocks(title: str) -> dict[str, str]:
    """Where it belongs (a file, or `file: table`) → code."""
    found = re.findall(r"^ *```python\n(.*?)^ *```$", SECTIONS[title], re.MULTILINE | re.DOTALL)
    return {code.partition("\n")[0].removeprefix("# "): code for code in map(dedent, found)}


def run(code: str, **known: Any) -> dict[str, Any]:
    """What the code defines."""
    names = dict(known)
    exec(compile(code, "CONTRIBUTING.md", "exec", flags=__future__.annotations.compiler_flag), names)
    return {name: value for name, value in names.items() if name not in known or known[name] is not value}


def entries(code: str, **known: Any) -> dict[str, Any]:
    """Of a table that is a dict."""
    found: dict[str, Any] = eval("{" + code + "\n}", known)
    return found


def the_test(code: str, file: str) -> Callable[..., None]:
    """The test that a block holds, with what its file has imported."""
    path = ROOT / file
    found = run(code, **(runpy.run_path(str(path)) if path.is_file() else {}))
    (test,) = (value for name, value in found.items() if name.startswith("test_"))
    return test


def test_there_are_six_recipes_and_each_is_in_the_table_of_costs() -> None:
    assert len(SECTIONS) == 6
    assert all(f"| {title[0].lower()}{title[1:]}" in PAGE for title in SECTIONS)


@pytest.mark.parametrize("title", SECTIONS)
def test_every_block_says_where_it_belongs(title: str) -> None:
    assert len(blocks(title)) >= 2
    for place in blocks(title):
        file, _, table = place.partition(": ")
        assert (ROOT / file).parent.is_dir()
        assert not table or re.search(rf"^{table}\b.*= [({{]", (ROOT / file).read_text(), re.MULTILINE), place


def test_a_selection_score(monkeypatch: pytest.MonkeyPatch) -> None:
    source, entry, words, test = blocks("A selection score").items()
    known = {**vars(scores), **run(source[1], **vars(scores))}
    for name, score in entries(entry[1], **known).items():
        monkeypatch.setitem(scores.SCORES, name, score)
    for name, text in entries(words[1]).items():
        monkeypatch.setitem(STRATEGIES, name, text)
    assert list(scores.SCORES) == list(STRATEGIES)
    the_test(test[1], test[0])()
    chosen = select(build("phi3"), S2FTConfig(ratios=0.25, strategy="peak"))
    assert len(chosen.slices) == 6
    assert parse_options({"model": "m", "data": "d", "output": "o", "strategy": "peak"}).strategy == "peak"
    with pytest.raises(S2FTError, match="saliency, peak"):
        S2FTConfig(strategy="best")


def test_a_model_family(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, mlp, test = blocks("A model family").items()
    for place, code in (attention, mlp):
        table = place.partition(": ")[2]
        monkeypatch.setattr(families, table, (*getattr(families, table), eval(code, dict(vars(families)))))
    of_families = runpy.run_path(str(ROOT / "tests" / "selection" / "test_families.py"))
    model = of_families["_NewModel"](of_families["hf"].PreTrainedConfig())
    assert [structure.kind for structure in find_structures(model)] == ["attention", "mlp"] * 2
    assert set(entries(test[1], **of_families)) <= set(of_families["COMPLETE"])


def test_an_export_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, entry, test = blocks("An export target").items()
    module = ModuleType("s2ft.exports.channels")
    vars(module).update(run(source[1]))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, target in entries(entry[1], **vars(targets)).items():
        monkeypatch.setitem(targets.TARGETS, name, target)
    the_test(test[1], test[0])(tmp_path)
    arguments = ["export", str(tmp_path / "adapter"), "--to", "channels", "--output", str(tmp_path / "again.json")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    whole = save_adapter(tmp_path / "whole", save_base(tmp_path / "b", "llama"), 0.5, modules_to_save=["lm_head"])
    with pytest.raises(S2FTError, match=r"lm_head.*channels alone"):
        export(whole, "channels", tmp_path / "none.json")
    with pytest.raises(S2FTError, match=r"must be a file that ends in \.json"):
        export(whole, "channels", tmp_path / "folder")
    assert not (tmp_path / "none.json").exists()


def test_a_method_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    source, entry, test = blocks("A method to compare with").items()
    known = {**vars(methods), **run(source[1], **vars(methods))}
    (name, method), *_ = entries(entry[1], **known).items()
    monkeypatch.setitem(methods.METHODS, name, method)
    options = parse_options({"model": "m", "data": "d", "output": "o", "method": name, **entries(test[1])[name]})
    base = build("llama")
    config = method.peft_config(options, base, None)
    trained = [path for path, p in get_peft_model(base, config).named_parameters() if p.requires_grad]
    assert trained
    assert all("ia3" in path for path in trained)
    with pytest.raises(S2FTError, match=f"ratios=0.5 is no option of method={name}"):
        parse_options({"model": "m", "data": "d", "output": "o", "method": name, "ratios": 0.5})


def test_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    row, decoding, test = blocks("A task").items()
    task = eval(row[1], {**vars(extraction), **vars(tasks)})
    monkeypatch.setitem(tasks.TASKS, task.name, task)
    for suite, how in entries(decoding[1], **vars(tasks)).items():
        monkeypatch.setitem(tasks.DECODING, suite, how)
    assert task.suite in tasks.DECODING
    assert tasks.find_tasks([task.name]) == tasks.find_tasks([task.folder]) == [task]
    the_test(test[1], test[0])()


def test_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    source, entry, test = blocks("A benchmark").items()
    module = ModuleType("s2ft.lab.bench.reading")
    vars(module).update(run(source[1]))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (name, row), *_ = entries(entry[1], **vars(registry)).items()
    assert f"s2ft bench {name} --json {name}.json" in row.described("bench", name)
    the_test(test[1], test[0])()
