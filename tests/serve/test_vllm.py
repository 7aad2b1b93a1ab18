"""`--engine vllm`: how vLLM's server is started. That it answers right: `make test-engines`."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from live_server import embedded
from s2ft import S2FTError, read_adapter
from s2ft.demo import base_path, serving
from s2ft.demo.skills import NEW_SKILLS
from s2ft.serve import vllm
from s2ft.serve.options import ServeOptions

BASE = str(base_path())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    embedded(folder)
    shutil.copytree(folder / "user0", folder / ".unfinished")
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be run, where vLLM is installed."""
    found: list[Any] = []
    monkeypatch.setattr(vllm, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execve", lambda *what: found.extend(what))
    monkeypatch.delenv("S2FT_KEYS", raising=False)
    return found


def options(**values: Any) -> ServeOptions:
    return ServeOptions.parse({"model": BASE, "engine": "vllm", **values})


def test_it_is_told_where_the_adapters_are_and_how_large(root: Path, started: list[Any], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("one-key-only")
    vllm.run(
        options(adapters=root, port=9, rows=7, precision="fp32", keys=tmp_path / "key", vllm_options="--seed 3 -x")
    )
    program, words, environment = started
    assert program == sys.executable
    assert words[:4] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
    assert words[-3:] == ["--seed", "3", "-x"]
    slices = [one for name in ("user0", "user1") for one in read_adapter(root / name).slices.values()]
    rank = next(rank for rank in (8, 16, 32, 64, 128, 256) if rank >= max(len(one.indices) for one in slices))
    given = dict(zip(words[4:-3:2], words[5:-3:2], strict=True))
    assert given == {
        "--model": BASE,
        "--served-model-name": "base",
        "--host": "127.0.0.1",
        "--port": "9",
        "--dtype": "float32",
        "--max-num-seqs": "7",
        "--max-lora-rank": str(rank),
        "--max-loras": "3",
    }
    assert environment["S2FT_VLLM_ADAPTERS"] == str(root.resolve())
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert environment["VLLM_API_KEY"] == "one-key-only"
    assert not any("one-key-only" in word for word in words)


def test_a_base_alone_needs_no_lora(started: list[Any]) -> None:
    vllm.run(options())
    assert not any("lora" in word for word in started[1])
    assert "S2FT_VLLM_ADAPTERS" not in {*started[2]} - {*os.environ}


def test_without_a_base_there_are_two_adapters(
    started: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    s2ft: Callable[..., tuple[int, str, str]],
) -> None:
    def make(skill: str) -> None:
        (made,) = embedded(tmp_path / "made", 1)
        (tmp_path / "made" / made).rename(serving.FOLDER / skill)

    monkeypatch.chdir(tmp_path)
    serving.FOLDER.mkdir(parents=True)
    monkeypatch.setattr(serving, "make", make)
    code, said, _ = s2ft("serve", "--engine", "vllm")
    assert code == 0
    assert [line.split("/")[-1] for line in said.splitlines()] == [f"{skill} ..." for skill in NEW_SKILLS]
    assert started[1][3] == "--enable-lora"
    assert started[2]["S2FT_VLLM_ADAPTERS"] == str(serving.FOLDER.resolve())


def test_where_vllm_is_missing_no_adapter_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s2ft: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    monkeypatch.setattr(serving, "make", lambda skill: pytest.fail("trained"))
    code, _, said = s2ft("serve", "--engine", "vllm")
    assert code == 2
    assert "needs vLLM, which is not installed" in said


def test_what_vllm_has_not_is_refused(root: Path, started: list[Any], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key second-key")
    with pytest.raises(S2FTError) as caught:
        vllm.run(options(timeout=3, queue=4, keys=tmp_path / "keys"))
    assert caught.value.problems == [
        "queue belongs to engine='s2ft'; vLLM has options of its own",
        "timeout belongs to engine='s2ft'; vLLM has options of its own",
        "engine='vllm' takes one key",
    ]
    with pytest.raises(S2FTError, match="vllm_options='--x' needs engine='vllm'"):
        ServeOptions.parse({"model": BASE, "vllm_options": "--x"})
    assert started == []


def test_an_adapter_that_vllm_cannot_serve_is_named(
    tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded(tmp_path, 1)
    monkeypatch.setattr("s2ft.exports.vllm.VLLM_RANKS", (1, 8))
    with pytest.raises(S2FTError, match=r"user0: .* and vLLM serves a LoRA of rank 8 at most"):
        vllm.run(options(adapters=tmp_path))


@pytest.mark.parametrize(("device", "slots"), [(None, "21"), ("mps", "21"), ("cuda", "16")])
def test_on_a_cpu_a_slot_stays_free(
    root: Path, tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, device: str | None, slots: str
) -> None:
    for number in range(20):
        (tmp_path / f"user{number}").symlink_to(tmp_path / ".one")
    shutil.copytree(root / "user0", tmp_path / ".one")
    found = None if device is None else torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    vllm.run(options(adapters=tmp_path))
    assert started[1][started[1].index("--max-loras") + 1] == slots


def test_an_adapter_with_the_name_of_the_base_is_refused(root: Path, started: list[Any]) -> None:
    with pytest.raises(S2FTError, match="the adapter 'user1' has the name of the base; give the base another: name="):
        vllm.run(options(adapters=root, name="user1"))
    assert started == []


def test_options_that_are_no_words_are_named(started: list[Any]) -> None:
    for words, why in (("--seed '3", "No closing quotation"), ("--seed 3\\", "No escaped character")):
        with pytest.raises(S2FTError) as caught:
            vllm.run(options(vllm_options=words, queue=4))
        assert caught.value.problems == [
            "queue belongs to engine='s2ft'; vLLM has options of its own",
            f"vllm_options={words!r} cannot be divided into words ({why}); expected such as '--seed 3'",
        ]
    assert started == []


def test_it_says_when_vllm_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(S2FTError, match="engine='vllm' needs vLLM, which is not installed: pip install vllm"):
        vllm.run(options())
