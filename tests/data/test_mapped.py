"""Examples in a file are the same as examples in memory, and their texts are never all in memory."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from s2ft import S2FTError
from s2ft.data import cache, mapped
from s2ft.data import examples as module
from s2ft.data.examples import data_digest, load
from s2ft.data.preference_tokens import tokenize_judged, tokenize_pairs
from s2ft.data.preferences import KINDS
from s2ft.data.tokens import encode, tokenize
from tiny_base import CHAT_TEMPLATE, CHATML, CHATML_TOKENS, byte_tokenizer

CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
SAID = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
PLAIN = [{"messages": [{**one, "content": f"{one['content']} {n}"} for one in SAID]} for n in range(7)]
RECORDS = {  # what sets later ones apart comes late: a table knows the first piece alone when its file begins
    "text": [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)],
    "chat": [*PLAIN, {"messages": [*SAID, SAID[0], CALL], "tools": TOOLS}],
    "long text": [{"text": "abc " * n} for n in range(1, 9)],
}
MEASURED = """
import sys, threading, time
from pathlib import Path
from s2ft.data.examples import data_digest, load_examples
from s2ft.data.tokens import tokenize
from s2ft.runtime.models import load_tokenizer

def held():  # bytes of memory that no file stands behind
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

def watch():
    while True:
        peak[0] = max(peak[0], held())
        time.sleep(0.02)

tokenizer = load_tokenizer(sys.argv[1])
tokenize(load_examples(sys.argv[2]), tokenizer, 2048)  # what is loaded with the first few
before, peak = held(), [0]
threading.Thread(target=watch, daemon=True).start()
examples = load_examples(sys.argv[3])
data_digest(examples)
tokens = tokenize(examples, tokenizer, 2048)
print(len(tokens.dataset), peak[0] - before)
"""


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def shorten(monkeypatch) -> None:
    """Pieces of three rows."""
    for where in (mapped, module):
        monkeypatch.setattr(where, "PIECE", 3)


def save_tokenizer(folder: Path, words: list[str]) -> str:
    """A token for each word."""
    numbers = {word: number for number, word in enumerate(["<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    LlamaConfig().save_pretrained(folder)
    return str(folder)


def write(file, records) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.mark.parametrize("form", RECORDS)
def test_examples_in_a_file_are_those_in_memory(form, tmp_path, monkeypatch):
    source, tokenizer = write(tmp_path / "data.jsonl", RECORDS[form]), byte_tokenizer(CHATML, CHATML_TOKENS)
    whole = load([source])
    shorten(monkeypatch)
    parts = load([source])
    assert (tmp_path / "cache").is_dir()  # the file was there
    assert not list((tmp_path / "cache" / "s2ft").iterdir())  # and has no name
    assert data_digest(parts.examples) == data_digest(whole.examples)
    assert parts.counts == whole.counts
    rows = [encode(loaded.examples, tokenizer, 400, in_parts=True).to_list() for loaded in (whole, parts)]
    assert rows[0] == rows[1]
    assert len(load([source], limit=4).examples) == 4


@pytest.mark.parametrize(("kind", "tokens"), [("pair", tokenize_pairs), ("judged", tokenize_judged)])
def test_so_are_the_tokens_of_preferences(kind, tokens, tmp_path, monkeypatch):
    records = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": str(n)} for n in range(8)]
    source = write(tmp_path / "data.jsonl", records)
    whole = tokens(load([source], kind=KINDS[kind]).examples, byte_tokenizer(), 40)
    shorten(monkeypatch)
    parts = tokens(load([source], kind=KINDS[kind]).examples, byte_tokenizer(), 40)
    assert parts.dataset.to_list() == whole.dataset.to_list()


def test_tokens_of_examples_in_a_file_are_kept_by_their_content(tmp_path, monkeypatch):
    source = write(tmp_path / "data.jsonl", RECORDS["chat"])
    whole = encode(load([source]).examples, byte_tokenizer(CHATML, CHATML_TOKENS), 400)
    shorten(monkeypatch)
    monkeypatch.setattr(cache, "FEWEST", len(RECORDS["chat"]))
    for _ in range(2):
        rows = encode(load([source]).examples, byte_tokenizer(CHATML, CHATML_TOKENS), 400)
        assert rows.cache_files
        assert rows.to_list() == whole.to_list()
    assert len(list((tmp_path / "cache" / "s2ft").iterdir())) == 1


def test_what_is_wrong_in_a_later_piece_is_told_by_its_place(tmp_path, monkeypatch):
    shorten(monkeypatch)
    source = write(tmp_path / "bad.jsonl", [*RECORDS["text"], {"prompt": 3, "completion": "x"}])
    with pytest.raises(S2FTError, match=r"bad\.jsonl:9: prompt is 3; it must be text"):
        load([source])
    mixed = write(tmp_path / "mixed.jsonl", [*RECORDS["text"], *PLAIN])
    with pytest.raises(S2FTError, match="mixes text and chat messages"):
        load([mixed])
    refused = write(tmp_path / "refused.jsonl", [*PLAIN, {"messages": [*SAID[:1], {**SAID[1], "reasoning": "so"}]}])
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    with pytest.raises(S2FTError, match=r"refused\.jsonl:8: the model's chat template leaves out"):
        tokenize(load([refused]).examples, tokenizer, 400)


def test_a_refusal_after_the_first_thousand_examples_is_told_by_its_place(tmp_path):
    bad = {"messages": [SAID[0], {**SAID[1], "reasoning": "so"}]}
    source = write(tmp_path / "refused.jsonl", [PLAIN[0]] * 1100 + [bad])
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    with pytest.raises(S2FTError, match=r"refused\.jsonl:1101: the model's chat template leaves out"):
        tokenize(load([source]).examples, tokenizer, 400)


def test_lists_that_are_empty_in_the_first_pieces_get_their_type_from_later_ones(monkeypatch):
    shorten(monkeypatch)
    rows = [{"prompt_ids": [], "number": n} for n in range(7)] + [{"prompt_ids": [5], "number": 7}] * 6
    assert mapped.mapped(iter(rows)).to_list() == rows
    assert mapped.mapped(iter(rows[:7])).to_list() == rows[:7]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["text", "chat"])
def test_preparing_a_large_file_takes_far_less_memory_than_the_file(form, tmp_path):
    draw = random.Random(0)
    words = [draw.randbytes(4).hex() for _ in range(500)]

    def record() -> dict:
        asked, said = (" ".join(draw.choices(words, k=count)) for count in (60, 160))
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        return {"prompt": asked, "completion": said} if form == "text" else {"messages": turns}

    few, many = (write(tmp_path / f"{n}.jsonl", (record() for _ in range(n))) for n in (2_000, 30_000))
    words_of_run = [sys.executable, "-c", MEASURED, save_tokenizer(tmp_path / "tokenizer", words), few, many]
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(words_of_run, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    rows, grown = map(int, done.stdout.split())
    size = Path(many).stat().st_size
    assert rows == 30_000
    assert size > 60e6
    assert grown < size / 2, f"{grown / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB"
