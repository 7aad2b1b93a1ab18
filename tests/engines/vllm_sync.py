"""Runs in the environment of vLLM: adapters go into a running engine's weights and out again, by `s2ft.sync`.

python vllm_sync.py FOLDER    writes the tokens of every row under each adapter and the base, before, between and after
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import s2ft


def main(folder: Path) -> None:
    import vllm

    asked = json.loads((folder / "asked.json").read_text())
    length = len(asked["rows"][0]["tokens"])
    engine = vllm.LLM(
        str(folder / "base"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        weight_transfer_config={"backend": "s2ft"},
    )
    sampling = vllm.SamplingParams(temperature=0, min_tokens=length, max_tokens=length, stop_token_ids=[asked["end"]])

    def rows(name: str | None) -> list[dict]:
        own = [row for row in asked["rows"] if row["adapter"] == name]
        done = engine.generate([{"prompt_token_ids": row["prompt"]} for row in own], sampling)
        return [
            {"expected": row["tokens"], "tokens": list(one.outputs[0].token_ids)}
            for row, one in zip(own, done, strict=True)
        ]

    found, sent = {"before": rows(None)}, {}
    for step, name in (("a", "a"), ("b after a", "b"), ("a after b", "a"), ("base again", None)):
        done = s2ft.sync(engine, None if name is None else folder / "native" / name)
        sent[step] = vars(done)
        found[step] = rows(name)
    (folder / "vllm-sync.json").write_text(json.dumps({"rows": found, "sent": sent}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
