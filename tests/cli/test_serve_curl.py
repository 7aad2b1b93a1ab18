"""The line that `s2ft serve` prints: a shell that runs it is answered."""

import json
import subprocess
from pathlib import Path

import pytest

from live_server import KEY, Live, embedded, live
from s2ft.cli.serve import _tell
from s2ft.serve.keys import KEYS
from s2ft.serve.service import Service

ODD = 'it\'s "$HOME"'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    embedded(tmp_path / "adapters", 1)
    return (tmp_path / "adapters" / "user0").rename(tmp_path / "adapters" / ODD).parent


def printed(server: Live, service: Service, capsys: pytest.CaptureFixture[str]) -> str:
    _tell(server.url, service)
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("curl "))


def answered(line: str) -> dict[str, object]:
    run = subprocess.run(["sh", "-c", line], capture_output=True, check=True, text=True)
    answer: dict[str, object] = json.loads(run.stdout)
    return answer


@pytest.mark.parametrize("chat", [True, False])
def test_it_is_answered_with_keys_in_a_file_without_a_template_and_by_an_odd_name(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], chat: bool
) -> None:
    keys = tmp_path / "my keys"
    keys.write_text(f"\n{KEY} another-key\n")
    with live(root, (KEY,)) as server:
        service = server.service
        service.options = service.options.model_copy(update={"keys": keys})
        if not chat:
            service.base.tokenizer.chat_template = None
        line = printed(server, service, capsys)
        answer = answered(line)
    assert KEY not in line
    assert (answer["model"], answer["object"]) == (ODD, "chat.completion" if chat else "text_completion")


def test_it_is_answered_with_keys_in_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with live(None, (KEY,)) as server:
        assert "Authorization" not in printed(server, server.service, capsys)
        monkeypatch.setenv(KEYS, f"{KEY} another-key")
        line = printed(server, server.service, capsys)
        answer = answered(line)
    assert KEY not in line
    assert answer["model"] == "base"
