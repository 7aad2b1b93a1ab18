"""Runs in the environment of llama.cpp: greedy tokens of every row, one model and adapter at a time, in float32."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    rows = asked["rows"]
    found = {
        "version": llama_cpp.__version__,
        "rows": [tokens(folder / "base.gguf", row, adapter(folder, row["adapter"]), asked["end"]) for row in rows],
        "merged": {
            name: [tokens(folder / f"merged-{name}.gguf", row, None, asked["end"]) for row in own]
            for name, own in asked["merged"].items()
        },
    }
    (folder / "llama.json").write_text(json.dumps(found))


def adapter(folder: Path, name: str | None) -> str | None:
    return None if name is None else str(folder / f"{name}.gguf")


def tokens(model: Path, row: dict, lora: str | None, end: int) -> list[int]:
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    llama = llama_cpp.Llama(
        str(model), lora_path=lora, n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, **exact
    )
    given, written = row["prompt"], []
    while len(written) < len(row["tokens"]):
        llama.eval(given)
        logits = llama.scores[llama.n_tokens - 1].copy()
        logits[end] = -np.inf
        given = [int(np.argmax(logits))]
        written += given
    llama.close()
    return written


if __name__ == "__main__":
    main(Path(sys.argv[1]))
