"""What comes with a model or under a data set's name is not run, and not read from where the user stands."""

import builtins
import json
from pathlib import Path

import pytest
import torch

from s2ft import S2FTError
from s2ft.data.examples import load_examples
from s2ft.evaluate.questions import load_questions
from s2ft.evaluate.tasks import TASKS
from s2ft.finetune.results import _stored_dtype
from s2ft.runtime.models import empty_model, load_model, load_tokenizer
from tiny_base import save_tiny_base

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "unheard-of"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""
CLASSES = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """A file that the code which came with the model makes; whoever is asked says yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "was here"


@pytest.fixture
def foreign(tmp_path, marker) -> str:
    """A base that brings its code along."""
    folder = save_tiny_base(tmp_path / "foreign")
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    for name in ("config.json", "tokenizer_config.json"):
        value = json.loads((folder / name).read_text())
        value |= {"auto_map": CLASSES, "model_type": "unheard-of", "tokenizer_class": "Tokenizer"}
        (folder / name).write_text(json.dumps(value))
    return str(folder)


@pytest.mark.parametrize(
    "load", [load_tokenizer, empty_model, _stored_dtype, lambda name: load_model(name, torch.float32)]
)
def test_code_that_comes_with_a_model_is_not_run(foreign, marker, load) -> None:
    with pytest.raises(ValueError, match=r"trust_remote_code|s2ft runs no such code"):
        load(foreign)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["text", "json", "imagefolder", "hf://datasets/text"])
def test_a_format_is_no_data_set(tmp_path, monkeypatch, name) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "notes.txt").write_text("secret")
    for file in ("train.json", "gsm8k/test.json"):
        (tmp_path / file).write_text(json.dumps([{"instruction": "a", "output": "b", "answer": "1"}]))
    monkeypatch.chdir(tmp_path)
    said = f"data={name!r} names no data set, but a format"
    for load in (load_examples, lambda data: load_questions(TASKS["gsm8k"], data)):
        with pytest.raises(S2FTError, match=said):
            load(name)
