"""Runs in the environment of vLLM: tokens per second of one adapter as a LoRA, merged, and put into the base by `s2ft.sync`.

python vllm_speed.py FOLDER lora|base|merged|patched    one engine; writes vllm-speed-KIND.json

The same adapter in all, so equal parameters; all rows ask for it. `base`: the engine of `lora`, asked without the adapter.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROWS, TOKENS, ROUNDS = 16, 64, 7
ADAPTER = "a"


def main(folder: Path, kind: str) -> None:
    import vllm
    from vllm.lora.request import LoRARequest

    import s2ft

    asked = json.loads((folder / "asked.json").read_text())
    given: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 64} if kind == "lora" else {}
    if kind == "patched":
        given = {"weight_transfer_config": {"backend": "s2ft"}}
    model = folder / ("merged/" + ADAPTER if kind == "merged" else "base")
    engine = vllm.LLM(
        str(model),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=ROWS,
        max_num_batched_tokens=1024,
        enable_prefix_caching=False,
        enforce_eager=True,
        **given,
    )
    sent = vars(s2ft.sync(engine, folder / "native" / ADAPTER)) if kind == "patched" else None
    request = LoRARequest(ADAPTER, 1, str(folder / "vllm" / ADAPTER)) if kind == "lora" else None
    prompts = [{"prompt_token_ids": asked["rows"][number % len(asked["rows"])]["prompt"]} for number in range(ROWS)]
    sampling = vllm.SamplingParams(temperature=0, min_tokens=TOKENS, max_tokens=TOKENS, stop_token_ids=[asked["end"]])
    found = {}
    for name, lora in {kind: request, **({"base": None} if kind == "lora" else {})}.items():
        speeds = []
        for number in range(ROUNDS + 1):
            start = time.perf_counter()
            done = engine.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
            if number:  # the first warms up
                speeds.append(ROWS * TOKENS / (time.perf_counter() - start))
        found[name] = {
            "tokens_per_s": statistics.median(speeds),
            "of": speeds,
            "tokens": done[0].outputs[0].token_ids[:8],
        }
    (folder / f"vllm-speed-{kind}.json").write_text(json.dumps({"speeds": found, "sent": sent}, default=list))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
