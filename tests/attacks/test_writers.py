"""Writers that are killed, that meet each other: what is at the output is whole, and nobody has to clear up."""

import json
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from commands import Command, contents, wait_for
from s2ft import S2FTConfig
from tiny_base import byte_tokenizer

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("server")]
Tries = Callable[[int, int], int]


class Undisturbed(NamedTuple):
    """What a command leaves when nobody disturbs it, the seconds that it takes, and all that it does to files."""

    contents: dict[str, str]
    seconds: float
    changes: list[str]


Expected = Callable[[str, str], Undisturbed]

SUFFIX = {"gguf": ".gguf", "patch": ".safetensors"}
ADAPTERS = ("a", "b")
KINDS = ("merge", "fuse", "lora", "gguf", "patch")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The process that all are forked from has started, which is not to be taken for time that a command needs."""
    assert Command(["--version"], tmp_path_factory.mktemp("server") / "log").wait() == 0


def undisturbed(words: list[str], output: Path, left: Callable[[Path], dict[str, str]] = contents) -> Undisturbed:
    start = time.perf_counter()
    command = Command(words, output.parent.with_suffix(".log"), within=output.parent)
    assert command.wait() == 0, command.printed
    return Undisturbed(left(output), time.perf_counter() - start, command.changes)


def moments(among: range, few: int, tries: Tries) -> list[int]:
    """When to kill: all of them in a soak, else some."""
    return sorted(random.sample(among, tries(min(few, len(among)), len(among))))


@pytest.fixture(scope="module")
def given(server: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 2.3M parameters and two adapters for it: writing takes a while."""
    folder = tmp_path_factory.mktemp("given")
    config = LlamaConfig(
        vocab_size=258, hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base", max_shard_size="2MB")
    byte_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(ADAPTERS):
        base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        options = {"ratios": {"o_proj": 0.5, "down_proj": 0.4}, "init_weights": False, "task_type": "CAUSAL_LM"}
        get_peft_model(base, S2FTConfig(seed=seed, **options)).save_pretrained(folder / name)
    return folder


def words(kind: str, given: Path, adapter: str, output: Path) -> list[str]:
    """The command that writes `adapter` to `output`; fuse adds the other to it, at another weight for each."""
    one = str(given / adapter)
    if kind == "merge":
        return ["merge", one, "--output", str(output)]
    if kind == "fuse":
        weights = {"a": "1,0.5", "b": "1,0.25"}[adapter]
        return ["fuse", *(str(given / name) for name in ADAPTERS), "--weights", weights, "--output", str(output)]
    return ["export", one, "--to", kind, "--output", str(output)]


@pytest.fixture(scope="module")
def expected(given: Path) -> Expected:
    known: dict[tuple[str, str], Undisturbed] = {}

    def find(kind: str, adapter: str) -> Undisturbed:
        if (kind, adapter) not in known:
            output = given / f"expected-{kind}-{adapter}" / f"out{SUFFIX.get(kind, '')}"
            known[kind, adapter] = undisturbed(words(kind, given, adapter, output), output)
        return known[kind, adapter]

    return find


def check_whole_or_nothing(output: Path, wanted: dict[str, str]) -> None:
    """After a kill: what lies at the output is whole."""
    assert contents(output) in ({}, wanted)


def check_next(command: list[str], output: Path, wanted: dict[str, str], log: Path) -> None:
    """The same command again needs no help; where all was there already, it says so."""
    was_there = bool(contents(output))
    again = Command(command, log)
    assert again.wait() == (2 if was_there else 0), again.printed
    assert "Traceback" not in again.printed
    if was_there:
        assert "holds files already" in again.printed or "exists already" in again.printed
    assert contents(output) == wanted
    left = {path.name for path in output.parent.iterdir()} - {output.name}
    assert left <= ({f".{output.name}.lock"} if was_there else set())


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_writer_leaves_nothing_that_needs_a_hand(
    kind: str, given: Path, expected: Expected, tmp_path: Path, tries: Tries
) -> None:
    """30 times each, at any moment."""
    wanted, seconds, _ = expected(kind, "a")
    for number in range(tries(1, 30)):
        output = tmp_path / str(number) / f"out{SUFFIX.get(kind, '')}"
        command = words(kind, given, "a", output)
        first = Command(command, tmp_path / f"{number}.log")
        time.sleep(random.uniform(0, seconds))
        first.kill()
        check_whole_or_nothing(output, wanted)
        check_next(command, output, wanted, tmp_path / f"{number}.again")


@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_may_die_before_anything_that_it_does_to_a_file(
    kind: str, given: Path, expected: Expected, tmp_path: Path, tries: Tries
) -> None:
    """Every moment in turn: at each call that opens, makes, renames or removes something at the output."""
    wanted, _, changes = expected(kind, "a")
    for moment in moments(range(len(changes)), 3, tries):
        output = tmp_path / str(moment) / f"out{SUFFIX.get(kind, '')}"
        command = words(kind, given, "a", output)
        killed = Command(command, tmp_path / f"{moment}.log", die_at=moment, within=output.parent)
        assert killed.wait() == -9, killed.printed
        check_whole_or_nothing(output, wanted)
        check_next(command, output, wanted, tmp_path / f"{moment}.again")


@pytest.mark.parametrize("kind", ["merge", "fuse"])
def test_a_writer_may_die_while_it_fills_an_empty_folder(
    kind: str, given: Path, expected: Expected, tmp_path: Path, tries: Tries
) -> None:
    """There its files are moved one by one, which the next command ends; never is there a config without weights."""
    wanted = expected(kind, "a").contents
    (tmp_path / "whole" / "out").mkdir(parents=True)
    _, _, changes = undisturbed(words(kind, given, "a", tmp_path / "whole" / "out"), tmp_path / "whole" / "out")
    moved = next(number for number, change in enumerate(changes) if change.startswith("os.rename"))
    for moment in moments(range(tries(moved, 0), len(changes)), 2, tries):  # in the suite, where files are moved
        output = tmp_path / str(moment) / "out"
        output.mkdir(parents=True)
        killed = Command(words(kind, given, "a", output), tmp_path / f"{moment}.log", moment, output.parent)
        assert killed.wait() == -9, killed.printed
        assert any(output.glob("*.safetensors")) or not any(output.glob("*config.json"))
        again = Command(words(kind, given, "a", output), tmp_path / f"{moment}.again")
        assert again.wait() == 0 or "holds files already" in again.printed
        assert contents(output) == wanted


@pytest.mark.parametrize(
    "kinds", [("merge", "merge"), ("fuse", "fuse"), ("lora", "lora"), ("gguf", "gguf"), ("merge", "lora")]
)
def test_of_two_writers_one_wins_whole_and_the_other_is_refused(
    kinds: tuple[str, str],
    given: Path,
    expected: Expected,
    tmp_path: Path,
    tries: Tries,
) -> None:
    for number in range(tries(2, 60)):
        folder = tmp_path / str(number)
        output = folder / f"out{SUFFIX.get(kinds[0], '')}"
        if number % 2 and not output.suffix:
            output.mkdir(parents=True)  # an empty folder may be there
        pair = []
        for kind, adapter in zip(kinds, ADAPTERS, strict=True):
            pair.append(Command(words(kind, given, adapter, output), tmp_path / f"{number}-{adapter}.log"))
            time.sleep(random.choice((0, 0.01, 0.1)))
        codes = [command.wait() for command in pair]
        assert sorted(codes) == [0, 2], [command.printed for command in pair]
        refused = pair[codes.index(2)].printed
        assert any(words in refused for words in ("another process", "holds files already", "exists already")), refused
        winner = codes.index(0)
        assert contents(output) == expected(kinds[winner], ADAPTERS[winner]).contents
        assert [path.name for path in folder.iterdir()] == [output.name]


TRAIN = "--max-steps 8 --save-every 2 --batch-size 4 --ratios 0.25 --layout indexed --precision fp32 --gradient-accumulation 1"
EVAL = "--max-new-tokens 6 --beams 1 --precision fp32 --batch-size 4 --task gsm8k"


def train_words(base: str, data: str, output: Path, *more: str) -> list[str]:
    return ["train", "--model", base, "--data", data, "--output", str(output), *TRAIN.split(), *more]


@pytest.fixture(scope="module")
def trained(server: None, base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Its adapter."""
    output = tmp_path_factory.mktemp("trained") / "run" / "out"
    return undisturbed(train_words(base, data, output), output, adapter_in)


def adapter_in(folder: Path) -> dict[str, str]:
    """What a training leaves, but for its seconds and its logged loss, which is the mean since the run went on."""
    found, card = contents(folder), folder / "README.md"
    timeless = re.sub(r"\| (seconds|training loss, at the end) \|.*", "", card.read_text()) if card.is_file() else ""
    return {name: found.get(name, "") for name in ("adapter_model.safetensors", "adapter_config.json")} | {
        card.name: timeless
    }


def finish(base: str, data: str, output: Path, log: Path) -> None:
    """Goes on as the refusals say, which is all that a user has to know."""
    again = Command(train_words(base, data, output), log)
    if again.wait() == 2 and "add --resume to go on" in again.printed:
        again = Command(train_words(base, data, output, "--resume"), log)
    code = again.wait()
    assert code == 0 or (code == 2 and "holds a finished run" in again.printed), again.printed
    assert "Traceback" not in again.printed


def check_result(output: Path, wanted: dict[str, str]) -> None:
    assert adapter_in(output) == wanted
    assert json.loads((output / "run.json").read_text())["status"] == "finished"
    assert (output / "report.html").read_text().rstrip().endswith("</html>")
    hidden = [path.name for folder in (output, output.parent) for path in folder.iterdir() if path.name.startswith(".")]
    assert set(hidden) <= {f".{output.name}.lock", ".run.json.lock"}  # of a run that was killed when it had ended


def test_a_killed_training_ends_with_the_same_bits(
    base: str, data: str, trained: Undisturbed, tmp_path: Path, tries: Tries
) -> None:
    wanted, seconds, _ = trained
    for number in range(tries(1, 30)):
        output = tmp_path / str(number) / "out"
        for attempt in range(2):  # killed once more when it goes on
            more = ["--resume"] if attempt and any(output.glob("checkpoint-*")) else []
            command = Command(train_words(base, data, output, *more), tmp_path / f"{number}.log")
            time.sleep(random.uniform(0, seconds))
            command.kill()
        finish(base, data, output, tmp_path / f"{number}.again")
        check_result(output, wanted)


def test_a_training_may_die_before_anything_that_it_does_to_a_file(
    base: str, data: str, trained: Undisturbed, tmp_path: Path, tries: Tries
) -> None:
    for moment in moments(range(len(trained.changes)), 2, tries):
        output = tmp_path / str(moment) / "out"
        command = Command(train_words(base, data, output), tmp_path / f"{moment}.log", moment, output.parent)
        assert command.wait() == -9, command.printed
        finish(base, data, output, tmp_path / f"{moment}.again")
        check_result(output, trained.contents)


def test_a_second_training_into_one_folder_is_refused_at_once(
    base: str, data: str, trained: Undisturbed, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with Command(train_words(base, data, output), tmp_path / "first", within=tmp_path, stop_at="checkpoint-4") as first:
        wait_for(lambda: first.is_stopped, first)
        others = [
            Command(train_words(base, data, output, *more), tmp_path / f"log{more}") for more in ([], ["--resume"])
        ]
        assert [other.wait() for other in others] == [2, 2]
        for other in others:
            assert "is being written by another process" in other.printed
        assert first.signal(signal.SIGCONT).wait() == 0, first.printed
    check_result(output, trained.contents)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("questions") / "dataset" / "gsm8k"
    folder.mkdir(parents=True)
    asked = [{"instruction": f"Add {n} and {n * n}.", "input": "", "answer": f"{n + n * n}.0"} for n in range(60)]
    (folder / "test.json").write_text(json.dumps(asked))
    return str(folder.parent.parent)


def test_a_killed_evaluation_ends_with_the_same_answers(
    base: str, questions: str, tmp_path: Path, tries: Tries
) -> None:
    def words_for(output: Path) -> list[str]:
        return ["eval", "--model", base, "--data", questions, "--output", str(output), *EVAL.split()]

    def answers(output: Path) -> tuple[dict, list[dict]]:
        run, *rows = map(json.loads, (output / "base" / "gsm8k.jsonl").read_text().splitlines())
        return run, sorted(rows, key=lambda row: int(row["id"]))

    start = time.perf_counter()
    assert Command(words_for(tmp_path / "whole"), tmp_path / "log").wait() == 0
    seconds = time.perf_counter() - start
    for number in range(tries(2, 30)):
        output, log = tmp_path / str(number), tmp_path / f"{number}.log"
        command = Command([*words_for(output), "--json", str(tmp_path / "rows.json")], log)
        time.sleep(random.uniform(0, seconds))
        command.kill()
        again = Command([*words_for(output), "--json", str(tmp_path / "rows.json")], log)
        assert again.wait() == 0, again.printed
        assert answers(output) == answers(tmp_path / "whole")
        assert sorted(path.name for path in (output / "base").iterdir()) == ["gsm8k.jsonl"]
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_second_evaluation_into_one_folder_is_refused(base: str, questions: str, tmp_path: Path) -> None:
    command = ["eval", "--model", base, "--data", questions, "--output", str(tmp_path / "out"), *EVAL.split()]
    with Command(command, tmp_path / "first", within=tmp_path / "out", stop_at="gsm8k.jsonl") as first:
        wait_for(lambda: first.is_stopped, first)
        second = Command(command, tmp_path / "second")
        assert second.wait() == 2, second.printed
        assert "is being written by another process" in second.printed
        assert first.signal(signal.SIGCONT).wait() == 0, first.printed
    assert len((tmp_path / "out" / "base" / "gsm8k.jsonl").read_text().splitlines()) == 61
