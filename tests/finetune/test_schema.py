"""The schema of `--config`: what the options read is valid, what they refuse by itself is not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from s2ft import S2FTError
from s2ft.finetune.methods import METHODS
from s2ft.finetune.options import TrainOptions, parse_options, read_config, to_yaml
from s2ft.finetune.schema import config_schema

ROOT = Path(__file__).parents[2]
SCHEMA = config_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
PATHS = {"model": "m", "data": "d", "output": "o"}
NUMBERS = [-1, 0, 1, 3, 7.5, 0.01, 1e9, 2**40]
TEXTS = ["auto", "x", "last:50%", "1,2", "bf16", "sft", "linear", "lora", "wandb", "o_proj=0.1", "a=b", ""]
VALUES = [*NUMBERS, *TEXTS, True, None, [], [1, 2], ["a", "b"], [0.5], {"o_proj": 0.1}, {"o_proj": 3}, {"a": "b"}]


def is_valid(values: dict[str, Any]) -> bool:
    return not [*VALIDATOR.iter_errors(values)]


def is_read(name: str, value: Any) -> bool:
    """By `s2ft train`, as far as this option alone is concerned."""
    try:
        parse_options({**PATHS, name: value})
    except S2FTError as error:
        return not re.search(rf"(^|- ){name}\b", str(error), re.MULTILINE)
    return True


def is_loose(value: Any, kind: Any) -> bool:
    """What is read, but should be written in another way: 1 for true, and a number as text."""
    return (kind is bool and not isinstance(value, bool)) or (
        isinstance(value, str) and value.replace(",", "").isdigit()
    )


def test_it_is_a_schema_of_every_option_with_its_help() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"].keys() == TrainOptions.model_fields.keys()
    assert all(rules["description"] for rules in SCHEMA["properties"].values())
    assert "required" not in SCHEMA
    assert SCHEMA["additionalProperties"] is False


def test_any_method_of_pefts_is_valid() -> None:
    assert is_valid({"method": "peft:miss"})
    assert is_valid({"method": "lora"})
    assert not is_valid({"method": "miss"})


@pytest.mark.parametrize("name", TrainOptions.model_fields)
def test_what_an_option_reads_is_valid(name: str) -> None:
    field = TrainOptions.model_fields[name]
    assert field.is_required() or is_valid({name: field.default})
    plain = [value for value in VALUES if value is not None and not is_loose(value, field.annotation)]
    assert [value for value in plain if is_read(name, value) and not is_valid({name: value})] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": "three"},
        {"batch_size": 2.5},
        {"batch_size": True},
        {"ratios": {"o_proj": 1.5}},
        {"ratios": {"attention": 0.1}},
        {"strategy": "best"},
        {"method": "bitfit"},
        {"objective": "ppo"},
        {"precision": "fp8"},
        {"data": [3]},
        {"packing": "often"},
        {"layers": [1.5]},
        {"lerning_rate": 1e-3},
        {"learning_rate": "fast"},
    ],
    ids=str,
)
def test_what_is_wrong_by_itself_is_not_valid(wrong: dict[str, Any]) -> None:
    assert not is_valid(wrong)
    with pytest.raises(S2FTError):
        parse_options({**PATHS, **wrong})


@pytest.mark.parametrize("method", METHODS)
def test_the_file_that_a_run_leaves_is_valid(method: str, tmp_path: Path) -> None:
    options = parse_options({**PATHS, "method": method, **({"ratios": "o_proj=0.1"} if method == "s2ft" else {})})
    (tmp_path / "run.yaml").write_text(to_yaml(options))
    assert is_valid(read_config(str(tmp_path / "run.yaml")))


def test_every_example_in_the_documentation_is_valid() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    blocks = [block for page in pages for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)]
    assert blocks
    for values in map(yaml.safe_load, blocks):
        assert is_valid(values), values
        parse_options({**PATHS, **values})


def test_the_command_prints_it_or_writes_it(s2ft, tmp_path: Path) -> None:
    code, printed, _ = s2ft("config-schema")
    assert (code, json.loads(printed)) == (0, SCHEMA)
    assert s2ft("config-schema", "-o", str(tmp_path / "a.json"))[0] == 0
    assert json.loads((tmp_path / "a.json").read_text()) == SCHEMA
    code, _, told = s2ft("config-schema", "-o", str(tmp_path / "a.yaml"))
    assert (code, "must end in .json" in told) == (2, True)
