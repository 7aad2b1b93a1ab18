"""Every command that writes, on a disk that is full: exit code 2, one clear line, nothing half-written."""

import gc
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from commands import contents
from s2ft import S2FTConfig
from s2ft.lab.bench.report import Report
from s2ft.runtime.models import load_model

pytestmark = pytest.mark.soak
SIZE = 700  # kB, of the whole disk
TRAIN = "--max-steps 2 --save-every 1 --batch-size 2 --ratios 0.25 --layout indexed --precision fp32 --gradient-accumulation 1"
EVAL = "--max-new-tokens 4 --beams 1 --precision fp32 --task gsm8k"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}k,uid={os.getuid()}", "tmpfs", str(folder)]
    may = next((prefix for prefix in ([], ["sudo", "-n"]) if succeeds([*prefix, *words])), None)
    if may is None:
        pytest.skip("no small disk can be mounted here")
    yield folder
    gc.collect()  # files that stay open in the frames of an error keep a disk busy
    subprocess.run([*may, "umount", str(folder)], check=True)


def succeeds(words: list[str]) -> bool:
    return shutil.which(words[0]) is not None and subprocess.run(words, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def given(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands read."""
    folder = tmp_path_factory.mktemp("given")
    for seed, name in enumerate("ab"):
        config = S2FTConfig(
            ratios={"o_proj": 0.5, "down_proj": 0.9}, init_weights=False, seed=seed, task_type="CAUSAL_LM"
        )
        get_peft_model(load_model(base, torch.float32), config).save_pretrained(folder / name)
    (folder / "dataset" / "gsm8k").mkdir(parents=True)
    asked = [{"instruction": f"Add {n} and 1.", "answer": f"{n + 1}.0"} for n in range(8)]
    (folder / "dataset" / "gsm8k" / "test.json").write_text(json.dumps(asked))
    return {"base": base, "data": data, "a": str(folder / "a"), "b": str(folder / "b"), "questions": str(folder)}


COMMANDS = {
    "merge": "merge {a} --output {disk}/out --json {disk}/facts.json",
    "fuse": "fuse {a} {b} --weights 0.5,0.5 --output {disk}/out --json {disk}/facts.json --png {disk}/picture.png",
    "lora": "export {a} --to lora --output {disk}/out --json {disk}/facts.json",
    "vllm": "export {a} --to vllm --output {disk}/out",
    "sglang": "export {a} --to sglang --output {disk}/out",
    "gguf": "export {a} --to gguf --output {disk}/out.gguf",
    "patch": "export {a} --to patch --output {disk}/out.safetensors",
    "inspect": "inspect {a} --png {disk}/picture.png --json {disk}/facts.json",
    "train": f"train --model {{base}} --data {{data}} --output {{disk}}/out --json {{disk}}/facts.json {TRAIN}",
    "eval": f"eval --model {{base}} --data {{questions}} --output {{disk}}/out --json {{disk}}/facts.json {EVAL}",
    "bench": "bench selection --json {disk}/facts.json",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    name: str, given: dict[str, str], disk: Path, s2ft: Callable[..., tuple[int, str, str]], tries: Callable[[int, int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if name == "bench":  # what is measured does not matter here
        monkeypatch.setattr("s2ft.lab.bench.selection.bench_selection", lambda tell: Report({}, [{"ms": 1.0}] * 99))
    words = COMMANDS[name].format(disk=disk, **given).split()
    expected = {}
    if "/out" in COMMANDS[name] and name not in ("train", "eval"):
        elsewhere = disk.with_name("elsewhere")
        elsewhere.mkdir()
        assert s2ft(*COMMANDS[name].format(disk=elsewhere, **given).split())[0] == 0
        expected = results(elsewhere)
    left = [0, *(random.randrange(8, SIZE // 4) for _ in range(tries(1, 40)))]
    for free in left:
        fill(disk, free)
        code, _, errors = s2ft(*words)
        check_whole(disk)
        if expected:
            assert results(disk) in ([expected] if code == 0 else [{}, expected])
        if code == 0 and free:
            continue
        assert code == 2, errors
        assert errors.startswith("error: ") or "\nerror: " in errors
        assert "no space left on the disk" in errors or "was not written whole" in errors
        assert "Traceback" not in errors


def results(folder: Path) -> dict[str, str]:
    """What a command leaves, but for reports."""
    return {path: digest for path, digest in contents(folder).items() if path.startswith("out")}


def check_whole(disk: Path) -> None:
    """A command that writes several things may have ended some of them: what is there is whole, and nothing is hidden."""
    for path in disk.rglob("*"):
        assert not path.name.startswith(".")
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert all(map(json.loads, path.read_text().splitlines()))
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        elif path.suffix == ".safetensors":
            load_file(path)


def fill(disk: Path, free: int) -> None:
    """Empties the disk, and takes all but so many kB of it."""
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (disk / "filler").write_bytes(b"x" * 1024 * (SIZE - free))
