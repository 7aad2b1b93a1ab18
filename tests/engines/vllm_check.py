"""Runs in the environment of vLLM: greedy tokens of every row, all rows in one batch.

python vllm_check.py FOLDER rows          the base with two exported adapters
python vllm_check.py FOLDER merged NAME   a merged checkpoint
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path, what: str, name: str = "") -> None:
    import vllm
    from vllm.lora.request import LoRARequest

    asked = json.loads((folder / "asked.json").read_text())
    rows = asked["rows"] if what == "rows" else asked["merged"][name]
    names = sorted({row["adapter"] for row in rows} - {None})
    requests = {n: LoRARequest(n, number, str(folder / "vllm" / n)) for number, n in enumerate(names, 1)}
    # One slot more than adapters: on the CPU, vLLM 0.32 gives rows of the base the last slot's adapter
    lora = {"enable_lora": True, "max_loras": len(names) + 1, "max_lora_rank": 64} if names else {}
    model = folder / "base" if what == "rows" else folder / "merged" / name
    engine = vllm.LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        **lora,
    )
    length = len(rows[0]["tokens"])
    sampling = vllm.SamplingParams(temperature=0, min_tokens=length, max_tokens=length, stop_token_ids=[asked["end"]])
    done = engine.generate(
        [{"prompt_token_ids": row["prompt"]} for row in rows],
        sampling,
        lora_request=[requests.get(row["adapter"]) for row in rows] if names else None,
    )
    found = {"version": vllm.__version__, "rows": [list(answer.outputs[0].token_ids) for answer in done]}
    (folder / f"vllm-{what}{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
