"""How long do everyday things take, whole commands with their imports, beside reading and writing the same bytes?

    inspect, fuse, merge, export    the command, in a process of its own     floor: what it reads, read; what it writes, written
    load                            an adapter on a model that is loaded     floor: its files, read
    prepare text, prepare chat      examples read, digested and tokenised    floor: their file, read

`imports_s` is measured in a run by itself: the sum of what Python's `-X importtime` reports.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model

from s2ft.common.errors import S2FTError
from s2ft.common.files import flush
from s2ft.demo import base_path
from s2ft.format.config import S2FTConfig
from s2ft.lab.bench.report import Report
from s2ft.runtime.models import load_model
from s2ft.runtime.timing import milliseconds

BUDGET = 0.01  # of the two adapters
COMMAND = "from s2ft_command import main; main()"
LOAD = """
import sys, time
import s2ft
from peft import PeftModel
from s2ft.runtime.models import load_model
import torch
model = load_model(sys.argv[1], torch.float32)
start = time.perf_counter()
PeftModel.from_pretrained(model, sys.argv[2])
print(time.perf_counter() - start)
"""
PREPARE = """
import os, sys, tempfile, time
with tempfile.TemporaryDirectory() as empty:  # or the second run would find the tokens of the first
    os.environ["HF_DATASETS_CACHE"] = empty
    from s2ft.data.examples import data_digest, load_examples
    from s2ft.data.tokens import tokenize
    from s2ft.runtime.models import load_tokenizer
    start = time.perf_counter()
    examples = load_examples(sys.argv[2])
    data_digest(examples)
    tokens = tokenize(examples, load_tokenizer(sys.argv[1]), 2048)
    print(time.perf_counter() - start)
"""
TEXT = (
    "the a model of language learns to answer questions about cities rivers mountains numbers and people who live there "
    "with their families because every day has its own story which nobody tells twice"
)
WORDS = TEXT.split()  # that examples are drawn from


@dataclass(frozen=True)
class Thing:
    """What is measured: a command by its words, or a program that prints its seconds."""

    name: str
    words: Sequence[str]
    reads: Sequence[Path]
    program: str | None = None
    writes: Path | None = None  # removed before each run
    once: bool = False  # it takes so long that it is not run again


def bench_everyday(
    model: str | None = None,
    examples: int = 100_000,
    repeats: int = 3,
    tell: Callable[[float], Any] = lambda done: None,
) -> Report:
    """Rows: what, seconds (median), imports_s, bytes (read and written), floor_s, ratio (seconds / floor_s).

    Args:
        model: A folder with a model in safetensors; None: the embedded base.
        examples: How many are prepared, of about 110 words each.
        repeats: Runs of each thing; examples are prepared once, and imports timed once.
        tell: Is told the share that is done.
    """
    base = Path(model or base_path())
    if examples < 1:
        raise S2FTError(f"examples={examples} must be 1 or more")
    if not any(base.glob("*.safetensors")):
        raise S2FTError(f"model={model!r} must be a folder with a model in safetensors")
    with TemporaryDirectory() as place:
        things = list(_things(base, Path(place), examples))
        rows = []
        for number, thing in enumerate(things):
            rows.append(_row(thing, repeats))
            tell((number + 1) / len(things))
    settings = {"model": base.name, "examples": examples, "repeats": repeats, "budget": BUDGET}
    return Report(settings={**settings, "torch_import_s": _import_seconds("import torch")}, rows=rows)


def everyday_line(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table, in units for people."""
    imports = "–" if row["imports_s"] is None else f"{row['imports_s']:.2f}"
    return {
        "what": row["what"],
        "s": f"{row['seconds']:.2f}",
        "imports, s": imports,
        "MB": f"{row['bytes'] / 1e6:.1f}",
        "floor, s": f"{row['floor_s']:.3f}",
        "/ floor": f"{row['ratio']:.1f}",
    }


def _things(model: Path, place: Path, examples: int) -> Iterator[Thing]:
    first, second = _adapters(model, place)
    weights = sorted(model.glob("*.safetensors"))
    of_both = [*_files(first), *_files(second)]
    yield Thing("inspect", ["inspect", str(first)], _files(first))
    fused, merged, exported = place / "fused", place / "merged", place / "exported"
    yield Thing("fuse", ["fuse", str(first), str(second), "--output", str(fused)], of_both, writes=fused)
    base = ["--base", str(model), "--output"]
    yield Thing("merge", ["merge", str(first), *base, str(merged)], [*weights, *_files(first)], writes=merged)
    lora = ["export", str(first), "--to", "vllm", *base, str(exported)]
    yield Thing("export", lora, _files(first), writes=exported)
    yield Thing("load", [str(model), str(first)], _files(first), LOAD)
    for name, write in (("text", _text_record), ("chat", _chat_record)):
        file = _written(place / f"{name}.jsonl", write, examples)
        yield Thing(f"prepare {name}", [str(model), str(file)], [file], PREPARE, once=True)


def _row(thing: Thing, repeats: int) -> dict[str, Any]:
    seconds = _median(1 if thing.once else repeats, lambda: _seconds(thing))
    imports = None if thing.program else _importing(thing)
    written = _files(thing.writes) if thing.writes else []
    floor = _median(repeats, lambda: _floor(thing.reads, written))
    size = sum(file.stat().st_size for file in (*thing.reads, *written))
    row = {"what": thing.name, "seconds": seconds, "imports_s": imports, "bytes": size}
    return {**row, "floor_s": floor, "ratio": seconds / floor}


def _seconds(thing: Thing) -> float:
    _cleared(thing)
    if thing.program:
        return float(_run([sys.executable, "-c", thing.program, *thing.words]).stdout.split()[-1])
    return milliseconds(lambda: _run(_words(thing))) / 1e3


def _importing(thing: Thing) -> float:
    _cleared(thing)
    return _imports(_words(thing))


def _words(thing: Thing) -> list[str]:
    return [sys.executable, "-c", COMMAND, *thing.words]


def _cleared(thing: Thing) -> None:
    if thing.writes:
        shutil.rmtree(thing.writes, ignore_errors=True)


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise S2FTError(f"{' '.join(words[3:])} failed: {done.stderr.strip()[-1000:]}")
    return done


def _import_seconds(program: str) -> float:
    return _imports([sys.executable, "-c", program])


def _imports(words: Sequence[str]) -> float:
    """The seconds that a program spends in imports."""
    return import_seconds(_run([words[0], "-X", "importtime", *words[1:]]).stderr)


def import_seconds(report: str) -> float:
    """The sum of what modules took by themselves, in seconds.

    Example:
        >>> import_seconds("import time:  500 |  900 | torch")
        0.0005
    """
    lines = [line for line in report.splitlines() if line.startswith("import time:")]
    fields = [line.removeprefix("import time:").split("|")[0].strip() for line in lines]
    return sum(int(own) for own in fields if own.isdigit()) / 1e6


def _floor(reads: Sequence[Path], writes: Sequence[Path]) -> float:
    """Seconds to read some files, and to write copies of others to the disk."""
    contents = [file.read_bytes() for file in writes]
    with TemporaryDirectory(dir=writes[0].parent.parent if writes else None) as place:

        def work() -> None:
            for file in reads:
                file.read_bytes()
            for number, content in enumerate(contents):
                Path(place, str(number)).write_bytes(content)
            flush(Path(place))

        return milliseconds(work) / 1e3


def _median(repeats: int, measure: Callable[[], float]) -> float:
    return median(measure() for _ in range(repeats))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _adapters(model: Path, place: Path) -> tuple[Path, Path]:
    """Two adapters of random deltas on channels of their own."""
    folders = place / "first", place / "second"
    for seed, folder in enumerate(folders):
        config = S2FTConfig(budget=BUDGET, seed=seed, init_weights=False, task_type="CAUSAL_LM")
        get_peft_model(load_model(str(model), torch.float32), config).save_pretrained(str(folder))
    return folders


def _written(file: Path, record: Callable[[random.Random], Any], count: int) -> Path:
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record(draw)) + "\n" for _ in range(count))
    return file


def _sentence(draw: random.Random, words: int) -> str:
    return f"{' '.join(draw.choices(WORDS, k=words)).capitalize()}."


def _text_record(draw: random.Random) -> dict[str, str]:
    return {"instruction": _sentence(draw, 30), "output": _sentence(draw, 80)}


def _chat_record(draw: random.Random) -> dict[str, Any]:
    asked, said = (
        {"role": "user", "content": _sentence(draw, 30)},
        {"role": "assistant", "content": _sentence(draw, 80)},
    )
    return {"messages": [asked, said]}
