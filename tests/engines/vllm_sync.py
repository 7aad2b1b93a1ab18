"""Runs in the environment of vLLM: adapters go into a running engine's weights and out again, by `s2ft.sync`.

python vllm_sync.py FOLDER offline|server    `vllm.LLM` in this process, or its server in another, by HTTP

Writes the tokens of every row under each adapter and the base, before, between and after.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_server import ask, command, serving

import s2ft

BACKEND = {"backend": "s2ft"}
Write = Callable[[list[list[int]]], list[list[int]]]  # prompts → what the engine writes, as its weights are


def main(folder: Path, how: str) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    with {"offline": offline, "server": server}[how](folder, asked) as (engine, write):

        def rows(name: str | None) -> list[dict]:
            own = [row for row in asked["rows"] if row["adapter"] == name]
            written = write([row["prompt"] for row in own])
            return [{"expected": row["tokens"], "tokens": tokens} for row, tokens in zip(own, written, strict=True)]

        found, sent = {"before": rows(None)}, {}
        for step, name in (("a", "a"), ("b after a", "b"), ("a after b", "a"), ("base again", None)):
            done = s2ft.sync(engine, None if name is None else folder / "native" / name)
            sent[step] = vars(done)
            found[step] = rows(name)
    (folder / f"vllm-sync-{how}.json").write_text(json.dumps({"rows": found, "sent": sent}))


@contextmanager
def offline(folder: Path, asked: dict) -> Iterator[tuple[Any, Write]]:
    """An engine in this process."""
    import vllm

    length = len(asked["rows"][0]["tokens"])
    engine = vllm.LLM(
        str(folder / "base"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        weight_transfer_config=BACKEND,
    )
    sampling = vllm.SamplingParams(temperature=0, min_tokens=length, max_tokens=length, stop_token_ids=[asked["end"]])

    def write(prompts: list[list[int]]) -> list[list[int]]:
        done = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
        return [list(one.outputs[0].token_ids) for one in done]

    yield engine, write


@contextmanager
def server(folder: Path, asked: dict) -> Iterator[tuple[str, Write]]:
    """A server's address."""
    options = {"--weight-transfer-config": json.dumps(BACKEND)}
    with serving(folder, command(folder), options, {"VLLM_SERVER_DEV_MODE": "1"}) as port:
        yield f"http://127.0.0.1:{port}", lambda prompts: [answer(port, prompt, asked) for prompt in prompts]


def answer(port: int, prompt: list[int], asked: dict) -> list[int]:
    status, tokens = ask(port, "base", prompt, asked)
    assert status == 200, tokens
    return tokens


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
