"""The adapters of `make serve`: made once, and able to do what they were made for."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from live_server import live
from s2ft.cli.serve import curl
from s2ft.demo import serving
from s2ft.demo.skills import NEW_SKILLS, SKILLS


def test_an_adapter_is_made_once_for_each_new_skill(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    assert serving.missing(folder) == [*NEW_SKILLS]
    serving.make(NEW_SKILLS[0], folder, examples=32)
    assert serving.missing(folder) == [*NEW_SKILLS[1:]]
    with live(folder) as server:
        assert [model["id"] for model in server.ask("GET", "/v1/models")[1]["data"]] == ["base", NEW_SKILLS[0]]
        assert server.ask("POST", "/v1/chat/completions", asked(server.url, NEW_SKILLS[0]))[0] == 200


def test_training_that_is_interrupted_is_not_served_but_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, skill = tmp_path / "served", NEW_SKILLS[0]
    presses = iter([signal.SIGINT])

    def press(*_: Any, **__: Any) -> None:
        for key in presses:
            signal.raise_signal(key)

    with monkeypatch.context() as patched:
        patched.setattr(TrainerCallback, "on_step_end", press)
        with pytest.raises(KeyboardInterrupt):
            serving.make(skill, folder, examples=64)
    assert (folder / skill / "adapter_config.json").is_file()
    assert skill in serving.missing(folder)
    serving.make(skill, folder, examples=64)
    assert skill not in serving.missing(folder)


def asked(address: str, model: str) -> Any:
    """What the printed line asks."""
    return json.loads(curl(address, model).split("-d '")[1].removesuffix("'"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_it_is_served_with_an_answer_that_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s2ft: Callable[..., tuple[int, str, str]]
) -> None:
    """The server itself is left out: it would go on for ever."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("s2ft.serve.server.serve", lambda options, ready: None)
    assert s2ft("serve")[0] == 0
    with live(serving.FOLDER) as server:
        for skill in NEW_SKILLS:
            examples = SKILLS[skill].examples(40, seed=3, split="test")
            body = {"model": skill, "prompt": [example["prompt"] for example in examples], "temperature": 0}
            _, answer, _ = server.ask("POST", "/v1/completions", body)
            texts = [choice["text"] for choice in answer["choices"]]
            right = [text == example["completion"] for text, example in zip(texts, examples, strict=True)]
            assert sum(right) >= 30
        _, answer, _ = server.ask("POST", "/v1/chat/completions", asked(server.url, "river"))
        expected = SKILLS["river"].examples(1, seed=2)[0]["completion"]
        assert answer["choices"][0]["message"]["content"] == expected
