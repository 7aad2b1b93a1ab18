"""Writers that are killed, that meet each other: what is at the output is whole, and nobody has to clear up."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from commands import Command, contents
from s2ft import S2FTConfig
from tiny_base import byte_tokenizer

pytestmark = pytest.mark.soak
Tries = Callable[[int, int], int]

SUFFIX = {"gguf": ".gguf", "patch": ".safetensors"}
ADAPTERS = ("a", "b")
KINDS = ("merge", "fuse", "lora", "gguf", "patch")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def expected(given: Path) -> Callable[[str, str], tuple[dict[str, str], float]]:
    """What a command leaves when nobody disturbs it, and the seconds that it takes."""
    known: dict[tuple[str, str], tuple[dict[str, str], float]] = {}

    def find(kind: str, adapter: str) -> tuple[dict[str, str], float]:
        if (kind, adapter) not in known:
            output = given / f"expected-{kind}-{adapter}{SUFFIX.get(kind, '')}"
            start = time.perf_counter()
            command = Command(words(kind, given, adapter, output), given / "log")
            assert command.wait() == 0, command.printed
            known[kind, adapter] = contents(output), time.perf_counter() - start
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
    kind: str, given: Path, expected: Callable[..., tuple[dict[str, str], float]], tmp_path: Path, tries: Tries
) -> None:
    """30 times each, at any moment."""
    wanted, seconds = expected(kind, "a")
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
    kind: str, given: Path, expected: Callable[..., tuple[dict[str, str], float]], tmp_path: Path, tries: Tries
) -> None:
    """Every moment in turn: at each call that opens, makes, renames or removes something at the output."""
    wanted, _ = expected(kind, "a")
    most = tries(3, 1000)
    first, step = random.randrange(5), random.randrange(3, 6)  # in the suite, some of the moments
    for number in range(most):
        moment = number if most > 10 else first + step * number
        output = tmp_path / str(moment) / f"out{SUFFIX.get(kind, '')}"
        command = words(kind, given, "a", output)
        killed = Command(command, tmp_path / f"{moment}.log", die_at=moment, within=output.parent)
        code = killed.wait()
        assert code in (0, -9), killed.printed
        check_whole_or_nothing(output, wanted)
        check_next(command, output, wanted, tmp_path / f"{moment}.again")
        if code == 0:
            return


@pytest.mark.parametrize(
    "kinds", [("merge", "merge"), ("fuse", "fuse"), ("lora", "lora"), ("gguf", "gguf"), ("merge", "lora")]
)
def test_of_two_writers_one_wins_whole_and_the_other_is_refused(
    kinds: tuple[str, str],
    given: Path,
    expected: Callable[..., tuple[dict[str, str], float]],
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
        assert contents(output) == expected(kinds[winner], ADAPTERS[winner])[0]
        assert [path.name for path in folder.iterdir()] == [output.name]
