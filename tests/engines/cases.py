"""What the engines are asked: a base, two adapters in every form, and the tokens that transformers writes.

    a  o, down       input side        b  q, k, v, up     output side (q and k change places in GGUF)

Everything is float32, so that engines can agree token for token; a row whose two best tokens are nearly tied could differ by
rounding alone, so deltas are drawn again until none is.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import s2ft
from s2ft.adapters.merge import merge
from s2ft.demo import base_path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from gguf_base import write_base

ADAPTERS = {
    "a": {"o_proj": 0.34, "down_proj": 0.05},
    "b": {"q_proj": 0.34, "k_proj": 0.5, "v_proj": 0.5, "up_proj": 0.1},
}
ROWS = ("a", "b", None, "a", "b", None)
PROMPT, NEW = 12, 24  # tokens
END = 256  # the token that ends a text: never written here, or most rows would be nothing else
MARGIN = 1e-2  # between the two largest logits; the engines' float32 differs by less than 1e-3
DELTA = 0.2


def make(folder: Path) -> dict[str, Any]:
    """Writes base, adapters, exports and merged models into `folder`; returns the rows with their expected tokens."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = folder / "base"
    AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32).save_pretrained(base)
    AutoTokenizer.from_pretrained(base_path()).save_pretrained(base)
    write_base(base, folder / "base.gguf")
    rows = _adapters_and_rows(folder, base)
    for name in ADAPTERS:
        native = folder / "native" / name
        exported = s2ft.export(native, "vllm", folder / "vllm" / name)
        s2ft.export(native, "gguf", folder / f"{name}.gguf")
        merge(native, folder / "merged" / name)
        write_base(folder / "merged" / name, folder / f"merged-{name}.gguf")
        print(f"{name}: {exported.facts()}", flush=True)
    _foreign_adapter(folder, base)
    _adapters_that_would_do_nothing(folder, base)
    asked = {"end": END, "rows": rows, "merged": {name: _merged_rows(folder, rows, name) for name in ADAPTERS}}
    (folder / "asked.json").write_text(json.dumps(asked))
    return asked


def _adapters_and_rows(folder: Path, base: Path) -> list[dict[str, Any]]:
    for attempt in range(20):
        torch.manual_seed(attempt)
        for name, ratios in ADAPTERS.items():
            _save_adapter(folder / "native" / name, base, ratios)
        prompts = torch.randint(32, 127, (len(ROWS), PROMPT))  # printable bytes
        prompts = prompts[torch.tensor([0, 0, 0, 1, 1, 1])]  # a, b and the base answer the same two prompts
        model = _load(base)
        for name in ADAPTERS:
            model = _with(model, folder / "native" / name, name)
        written, margin = _write(model, prompts, [name or "__base__" for name in ROWS])
        # The same prompt under a, b and no adapter: if two agreed, the check could not fail
        distinct = min(len({tuple(row) for row in part}) for part in (written[:3], written[3:]))
        if margin > MARGIN and distinct == 3:
            named = zip(ROWS, prompts.tolist(), written, strict=True)
            return [{"adapter": name, "prompt": prompt, "tokens": tokens} for name, prompt, tokens in named]
    raise RuntimeError(f"in every attempt tokens are nearly tied or the adapters agree: {margin=}, {distinct=}")


def _merged_rows(folder: Path, rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows of one adapter, written by its merged checkpoint in transformers."""
    own = [row for row in rows if row["adapter"] == name]
    written, margin = _write(_load(folder / "merged" / name), torch.tensor([row["prompt"] for row in own]), None)
    assert margin > MARGIN / 2
    assert written == [row["tokens"] for row in own]
    return [{"adapter": None, "prompt": row["prompt"], "tokens": row["tokens"]} for row in own]


def _write(model: Any, prompts: torch.Tensor, names: list[str] | None) -> tuple[list[list[int]], float]:
    """Greedy tokens of each row, and the smallest gap between the two largest logits on the way."""
    given = {} if names is None else {"adapter_names": names}
    options = {
        "min_new_tokens": NEW,
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": END,
        "pad_token_id": 257,
    }
    everything = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options, **given)
    with torch.no_grad():
        logits = model(input_ids=everything, **given).logits[:, PROMPT - 1 : -1]
    logits[..., END] = -torch.inf
    best = logits.topk(2).values
    return everything[:, PROMPT:].tolist(), float((best[..., 0] - best[..., 1]).min())


def _save_adapter(folder: Path, base: Path, ratios: dict[str, float]) -> None:
    model = get_peft_model(_load(base), s2ft.S2FTConfig(ratios=ratios, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if ".s2ft_block." in name):
            parameter.normal_(std=DELTA)
    model.save_pretrained(folder)


def _foreign_adapter(folder: Path, base: Path) -> None:
    """One that was made for other weights."""
    other = _load(base)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.add_(1)
    model = get_peft_model(other, s2ft.S2FTConfig(ratios={"down_proj": 0.05}, task_type="CAUSAL_LM"))
    model.save_pretrained(folder / "native" / "foreign")


def _adapters_that_would_do_nothing(folder: Path, base: Path) -> None:
    """One with deltas of zero, and an exported one whose modules have other names than the engine's."""
    model = get_peft_model(_load(base), s2ft.S2FTConfig(ratios={"down_proj": 0.05}, task_type="CAUSAL_LM"))
    model.save_pretrained(folder / "native" / "zero")
    shutil.copytree(folder / "vllm" / "a", folder / "wrong-prefix")
    weights = folder / "wrong-prefix" / "adapter_model.safetensors"
    renamed = {name.replace(".model.model.", ".model.text.model."): one for name, one in load_file(weights).items()}
    save_file(renamed, weights)


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _with(model: Any, adapter: Path, name: str) -> PeftModel:
    if isinstance(model, PeftModel):
        model.load_adapter(adapter, name)
        return model
    return PeftModel.from_pretrained(model, adapter, adapter_name=name).eval()
