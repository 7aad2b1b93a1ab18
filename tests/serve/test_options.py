"""What `s2ft serve` refuses before it starts, and what it says."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import MambaConfig, MambaForCausalLM

from families import build
from s2ft import S2FTError
from s2ft.demo import base_path
from s2ft.serve.model import prepared
from s2ft.serve.options import ServeOptions
from s2ft.serve.server import listening
from served import Letters

BASE = str(base_path())


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("first-key-1\nsecond-key-2\n")
    return file


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"adapters": "nowhere"}, "adapters='nowhere' is no folder"),
        ({"port": 70000}, "port=70000 is no port"),
        ({"rows": 0}, "rows=0 must be 1 or more"),
        ({"timeout": "-1"}, "timeout='-1' must be more than 0|timeout=.* must be more than 0"),
        (
            {"host": "0.0.0.0"},
            r"host='0.0.0.0' can be reached from other machines, so it needs keys: keys=FILE, or \$S2FT_KEYS",
        ),
        ({"host": "example.org"}, "host='example.org' can be reached"),
        ({"host": ""}, "host='' can be reached"),
        ({"keys": "nowhere"}, "keys='nowhere' cannot be read"),
        ({"precision": "fp8"}, "precision='fp8' is unknown; choose from auto, bf16, fp32"),
        ({"model": "./nowhere"}, "model='./nowhere' is not a folder"),
    ],
)
def test_what_is_wrong_is_said(values: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S2FT_KEYS", raising=False)
    with pytest.raises(S2FTError, match=said):
        ServeOptions.parse({"model": BASE, **values})


def test_other_machines_are_let_in_with_keys(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServeOptions.parse({"model": BASE, "host": "0.0.0.0", "keys": keys}).keys == keys
    monkeypatch.setenv("S2FT_KEYS", "a-key-of-mine")
    assert not ServeOptions.parse({"model": BASE, "host": "::"}).is_local
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        assert ServeOptions.parse({"model": BASE, "host": host}).is_local


@pytest.mark.parametrize("text", ["", "   \n", "short", "kéy-with-letters"])
def test_a_file_of_keys_has_keys(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(S2FTError, match=r"holds no key|holds a key of less than 8 characters"):
        ServeOptions.parse({"model": BASE, "keys": tmp_path / "keys"})


def test_the_base_is_called_by_its_folder_or_its_name_on_the_hub() -> None:
    assert ServeOptions.parse({"model": BASE}).base_name == "base"
    assert ServeOptions.parse({"model": "Qwen/Qwen3-0.6B"}).base_name == "Qwen/Qwen3-0.6B"
    assert ServeOptions.parse({"model": BASE, "name": "mother"}).base_name == "mother"


def test_a_dot_in_the_name_of_a_folder_begins_no_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file, blob = tmp_path / "Qwen3-0.6B", tmp_path / "qwen3-0.6b.Q8_0.gguf", tmp_path / "0123abcd"
    folder.mkdir()
    blob.touch()
    file.symlink_to(blob)
    monkeypatch.chdir(folder)
    names = [ServeOptions.model_construct(model=str(model), name=None).base_name for model in (folder, ".", file)]
    assert names == ["Qwen3-0.6B", "Qwen3-0.6B", "qwen3-0.6b.Q8_0"]


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            S2FTError, match=f"host='127.0.0.1', port={port}: cannot listen there: Address already in use"
        ):
            listening("127.0.0.1", port)


def test_a_model_whose_rows_cannot_join_a_batch_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(S2FTError, match="MambaForCausalLM takes no position_ids"):
        prepared(model, Letters())
    hybrid = build("llama")
    hybrid.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(S2FTError, match="LlamaForCausalLM has layers of linear_attention"):
        prepared(hybrid, Letters())


def test_an_adapter_does_not_take_the_name_of_the_base(tmp_path: Path) -> None:
    from live_server import embedded, live

    embedded(tmp_path, 1)
    with pytest.raises(S2FTError, match="the adapter 'user0' has the name of the base"), live(tmp_path, name="user0"):
        pass


def test_the_command_says_what_is_wrong(s2ft: Callable[..., tuple[int, str, str]]) -> None:
    code, _, said = s2ft("serve", BASE, "--adapters", "nowhere", "--port", "x")
    assert code == 2
    assert "--adapters='nowhere' is no folder" in said
    assert "--port='x'" in said
