"""The README's commands run as they stand, on the embedded model in place of the one from the Hub."""

import json
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from commands import Command, wait_for
from s2ft.demo import base_path
from s2ft.demo.skills import SKILLS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_MODEL = "Qwen/Qwen3-0.6B"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's data, and the embedded model under the Hub model's name."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(base_path(), folder / HUB_MODEL)
    examples = SKILLS["reverse"].examples(24, seed=0)
    (folder / "your-data.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return folder


def run(words: list[str] | str, desk: Path) -> None:
    """A command, or a program in Python."""
    command = Command(words, desk / "log", cwd=desk)
    assert command.wait() == 0, command.printed


def serve(words: list[str], desk: Path) -> None:
    """Starts the server, asks it as it says itself, and stops it."""
    with Command([*words, "--port", "0"], desk / "served", cwd=desk) as server:
        wait_for(lambda: "\ncurl " in server.printed, server)
        asking = next(line for line in server.printed.splitlines() if line.startswith("curl "))
        answer = json.loads(subprocess.run(["bash", "-c", asking], capture_output=True, check=True).stdout)
        assert server.signal(signal.SIGTERM).wait() == -signal.SIGTERM
    assert answer["model"] == "your-adapter"
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")


def test_the_commands_run(desk: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert [line for line in lines if line.startswith("make")] == ["make quickstart", "make serve"]
    for typed in [shlex.split(line, comments=True) for line in lines if line.startswith("s2ft")]:
        (serve if typed[1] == "serve" else run)(typed[1:], desk)
    assert (desk / "your-adapter" / "adapter_model.safetensors").is_file()
    assert (desk / "channels.png").read_bytes().startswith(b"\x89PNG")
    for program in blocks("python"):
        run(program, desk)


def test_the_map_names_every_folder_and_no_other() -> None:
    folders = {path.parent.name for path in (ROOT / "src" / "s2ft").glob("*/__init__.py")}
    assert set(re.findall(r"^\| \[`(\w+)`\]", README, flags=re.MULTILINE)) == folders


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
