"""A model's name is looked up before anything is loaded: in a folder, in the Hub's cache, on the Hub."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from s2ft import S2FTError
from s2ft.demo import base_path
from s2ft.runtime.lookup import check_hub


def test_what_is_here_or_cached_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *_: pytest.fail("asked"))
    (tmp_path / "models--some--model" / "snapshots").mkdir(parents=True)
    check_hub(str(base_path()))
    check_hub("some/model")


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("no-such-folder", False, "there is no such folder here, and no such model on the Hub"),
        ("no-such-folder", OSError("no connection"), "no such folder here, and the Hub says: no connection"),
        ("a/b/c", None, "no such folder here, and the Hub says: Repo id must be in the form"),
    ],
)
def test_what_is_nowhere_is_refused(
    name: str, answer: bool | Exception | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def file_exists(*_: str) -> bool:
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    if answer is not None:
        monkeypatch.setattr(huggingface_hub, "file_exists", file_exists)
    with pytest.raises(S2FTError, match=message):
        check_hub(name)


def test_what_the_hub_has_is_loaded_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *_: True)
    check_hub("some/model")
