"""Options of an evaluation: everything that is wrong is said at once, before anything heavy is imported or written."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from s2ft import S2FTError
from s2ft.cli.app import app
from s2ft.evaluate.options import EvalOptions


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    values = {
        "model": "./none",
        "task": ["gsm9k"],
        "adapter": ["./no"],
        "output": str(file),
        "limit": "0",
        "beams": "x",
    }
    values |= {"prompt": "vicuna", "judge": "me", "batch_size": "8"}
    with pytest.raises(S2FTError) as caught:
        EvalOptions.parse(values)
    assert [problem.split("=")[0] for problem in sorted(caught.value.problems)] == [
        "adapter",
        "beams",
        "data is missing: Folder with dataset/NAME/test.json (MT-Bench: question.jsonl); or Hub name",
        "judge",
        "limit",
        "model",
        "output",
        "prompt",
        "task",
    ]
    assert "limit='0' must be 1 or more" in caught.value.problems


def test_values_may_be_text() -> None:
    options = EvalOptions.parse({"model": "m", "data": "d", "output": "o", "limit": "3", "task": ["gsm8k"]})
    assert (options.limit, options.output, options.batch_size) == (3, Path("o"), 8)
    assert [task.name for task in options.tasks] == ["gsm8k"]


@pytest.mark.parametrize(("option", "value"), [("beams", "2"), ("engine", "vllm"), ("judge-url", "http://h/v1")])
def test_the_harness_refuses_what_it_has_no_use_for(base: str, option: str, value: str) -> None:
    words = ["eval", "--model", base, "--harness", "lm-eval", "--task", "t", f"--{option}", value]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, S2FTError)
    assert str(error).startswith(f"{option.replace('-', '_')}={value!r} is no option here")
