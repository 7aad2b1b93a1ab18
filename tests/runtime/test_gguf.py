"""Models in GGUF: the values that the gguf library itself reads out of the file, and a model that trains like any other."""

from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")

from gguf_base import rotary_pairs, write_base  # noqa: E402 - needs gguf
from s2ft import S2FTError  # noqa: E402
from s2ft.demo import base_path  # noqa: E402
from s2ft.finetune.options import TrainOptions  # noqa: E402
from s2ft.finetune.train import train  # noqa: E402
from s2ft.runtime.conversion import convert  # noqa: E402
from s2ft.runtime.models import empty_model, load_model, load_tokenizer  # noqa: E402

Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A quantised file, and what its tensors stand for."""
    file = tmp_path_factory.mktemp("gguf") / "base.gguf"
    return file, write_base(base_path(), file, quantise=Q8, vocabulary=True)


def in_place_of(name: str, values, config) -> torch.Tensor:
    """The file's values in the checkpoint's order of rows: rotary pairs apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            order = rotary_pairs(torch.arange(len(values))[:, None].numpy(), count)[:, 0]
            rows = torch.empty(values.shape)
            rows[torch.from_numpy(order)] = torch.from_numpy(values)
            return rows
    return torch.from_numpy(values)


def test_the_weights_are_those_that_the_file_stands_for(stored) -> None:
    file, values = stored
    model = load_model(str(file), torch.float32)
    found = model.state_dict()
    for name, value in values.items():
        assert torch.equal(found[name], in_place_of(name, value, model.config)), name
    assert not hasattr(model.config, "quantization_config")
    assert model.name_or_path == str(file)


def test_a_folder_with_one_file_means_that_file(stored) -> None:
    file, _ = stored
    assert load_tokenizer(str(file.parent)).decode(load_tokenizer(str(file))("add: 1+1\n").input_ids) == "add: 1+1\n"
    assert empty_model(str(file.parent)).config.hidden_size == 192


def test_a_converted_folder_holds_the_same_model(stored, tmp_path: Path) -> None:
    file, _ = stored
    convert(str(file), tmp_path / "model")
    one, other = load_model(str(file), torch.float32), load_model(str(tmp_path / "model"), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert load_tokenizer(str(tmp_path / "model")).chat_template == load_tokenizer(str(file)).chat_template


def test_it_trains_and_the_adapter_names_the_file(stored, data: str, tmp_path: Path) -> None:
    file, _ = stored
    options = TrainOptions(model=str(file), data=[data], output=str(tmp_path / "o"), max_steps=2, seed=0)
    result = train(options)
    assert result.model.peft_config["default"].base_model_name_or_path == str(file)


def test_every_weight_of_it_trains_and_is_saved(stored, data: str, tmp_path: Path) -> None:
    for name in (stored[0], stored[0].parent):
        output = tmp_path / name.name
        train(TrainOptions(model=str(name), data=[data], output=str(output), method="full", max_steps=1))
        assert load_model(str(output), torch.float32).config.hidden_size == 192


def broken(folder: Path, file: Path, kind: str) -> Path:
    """The file, damaged so."""
    content, target = file.read_bytes(), folder / f"{kind}.gguf"
    damaged = {
        "short": content[: len(content) // 2],
        "other": b"PK" + content[2:],
        "unknown": content.replace(b"llama", b"lxama"),
    }
    target.write_bytes(damaged[kind])
    return target


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("short", "cut short or of a kind that transformers does not read"),
        ("other", "is no GGUF file: it does not start with 'GGUF'"),
        ("unknown", "lxama"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_and_nothing_is_written(
    stored, tmp_path: Path, kind: str, reason: str
) -> None:
    file = broken(tmp_path, stored[0], kind)
    for read in (lambda: load_model(str(file), torch.float32), lambda: convert(str(file), tmp_path / "model")):
        with pytest.raises(S2FTError, match=reason) as refused:
            read()
        assert str(file) in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]


def test_two_files_in_a_folder_are_not_guessed_between(stored, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(stored[0].read_bytes()[:100])
    with pytest.raises(S2FTError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\)"):
        load_model(str(tmp_path), torch.float32)


def test_only_gguf_is_converted(tmp_path: Path) -> None:
    with pytest.raises(S2FTError, match="is no GGUF file, so there is nothing to convert"):
        convert(str(base_path()), tmp_path / "model")


def test_a_missing_library_is_named(stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2ft.runtime.gguf.find_spec", lambda name: None)
    with pytest.raises(S2FTError, match=r"needs the package gguf: pip install 's2ft\[gguf\]'"):
        load_model(str(stored[0]), torch.float32)
