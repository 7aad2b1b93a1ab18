"""The token that ends answers, as a run has noted it, stands in the generation config of a merged model."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from exported import save_adapter
from s2ft import S2FTError
from s2ft.adapters.merge import merge
from tiny_base import CHATML, CHATML_TOKENS, save_tiny_base

TURN_END = 259  # <|im_end|>; the tokenizer's <eos> is 1


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_base(tmp_path / "base", CHATML, CHATML_TOKENS)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, {"o_proj": 0.5})


def note(adapter: Path, end: object) -> None:
    (adapter / "run.json").write_text(json.dumps({"data": {"format": "chat", "answer_end": end}}))


@pytest.mark.parametrize("named", [1, [1, 7], None])
def test_it_is_added_to_those_that_the_base_names(named: object, base: Path, adapter: Path, tmp_path: Path) -> None:
    file = base / "generation_config.json"
    given = {"eos_token_id": named, "temperature": 0.6, "top_k": 5, "transformers_version": "4.0"}
    file.write_text(json.dumps(given))
    note(adapter, "<|im_end|>")
    found = json.loads((merge(adapter, tmp_path / "merged") / file.name).read_text())
    ends = {1: [1], None: []}.get(named, named) if not isinstance(named, list) else named
    assert found == {**given, "eos_token_id": [TURN_END, *ends]}


def test_a_base_without_a_generation_config_gets_what_its_configuration_says(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (base / "generation_config.json").unlink()
    note(adapter, "<|im_end|>")
    found = GenerationConfig.from_pretrained(merge(adapter, tmp_path / "merged"))
    assert (found.eos_token_id, found.pad_token_id) == ([TURN_END, 1], 0)


@pytest.mark.parametrize("card", [None, {}, {"data": {"format": "chat"}}, {"data": None}])
def test_without_a_note_the_file_is_the_bases_byte_for_byte(
    card: object, base: Path, adapter: Path, tmp_path: Path
) -> None:
    file = base / "generation_config.json"
    file.write_text('{"eos_token_id":   1}')
    if card is not None:
        (adapter / "run.json").write_text(json.dumps(card))
    assert (merge(adapter, tmp_path / "merged") / file.name).read_bytes() == file.read_bytes()


def test_an_end_that_is_named_already_changes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = base / "generation_config.json"
    file.write_text(f'{{"eos_token_id":   [1, {TURN_END}]}}')
    note(adapter, "<|im_end|>")
    assert (merge(adapter, tmp_path / "merged") / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("end", "shown"), [("<|eot|>", "'<|eot|>'"), (7, "7"), (["<|im_end|>"], r"['<|im_end|>']")])
def test_a_token_that_the_base_does_not_have_is_refused(end: object, shown: str, adapter: Path, tmp_path: Path) -> None:
    note(adapter, end)
    with pytest.raises(S2FTError) as refused:
        merge(adapter, tmp_path / "merged")
    assert f"run.json says that answers end with {shown}, which the base's tokenizer does not have" in str(
        refused.value
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_base_without_a_tokenizer_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()
    note(adapter, "<|im_end|>")
    with pytest.raises(S2FTError, match=r"base='.*': its tokenizer cannot be loaded"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
