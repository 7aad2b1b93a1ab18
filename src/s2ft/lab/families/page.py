"""The support table as a page of the documentation, from what `s2ft bench families` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "causal": "Causal language models",
    "seq2seq": "Encoder-decoders",
    "encoder": "Encoders",
    "vision": "Vision",
    "vision-language": "Vision and language",
    "speech": "Speech",
}

LEFT_OUT = {
    "ibert": "its linear layers take a scale beside their input, and return one",
    "jetmoe": "experts are modules of its own, called with the number of tokens of each",
    "reformer": "its reversible layers have a backward of their own, in training mode alone",
    "xlnet": "q, k and v are parameters of three dimensions, multiplied by einsum",
}
"""model_type → what s2ft does not train of it, and why."""

HEAD = """# Models

What s2ft does with a tiny random model of every class that transformers {version} lists, in float64 where the model's own
code allows it. This page is written by

    s2ft bench families --json results/families.json --page docs/families.md --kept rows.jsonl

which keeps each row as it is found, and goes on from there when it is interrupted.

An adapter of half the heads and channels of all projections that are read, with random deltas, is trained, saved, loaded,
merged and laid out in place.

- **exact**: the gradient of every slice is that of full autograd (worst relative error in float64: {worst}; with experts,
  whose routers round to float32: {routed}), a loaded adapter gives the same output bit for bit, and merged weights are the
  sums bit for bit.
- **heads**: they are read on q, k, v and o, so that they can be permuted.
- **in place**: slices that lie in one piece, of all. The others are gathered, for a reason that `layout.placements` gives.
- **experts**: those that are stacked in one parameter are trained as well, each on channels of its own.
- **LoRA**: exported as one and loaded by PEFT, an adapter gives the same output. **GGUF**: adapters export to llama.cpp.

{summary}
"""


def page_of(report: Mapping[str, Any]) -> str:
    """The whole page, in Markdown.

    Args:
        report: As `s2ft bench families --json` writes it.
    """
    rows = report["rows"]
    exact = [row for row in rows if row.get("exact") and row["dtype"] == "float64"]
    worst, routed = (
        max((row["gradient_error"] for row in exact if bool(row["experts"]) is with_experts), default=0.0)
        for with_experts in (False, True)
    )
    counts = [_count(title, [row for row in rows if row["kind"] == kind]) for kind, title in TITLES.items()]
    summary = "\n".join(["| kind | classes | run | exact | with heads |", "|---|---|---|---|---|", *counts])
    head = HEAD.format(
        version=report["settings"]["transformers"], worst=f"{worst:.0e}", routed=f"{routed:.0e}", summary=summary
    )
    parts = [_part(title, [row for row in rows if row["kind"] == kind]) for kind, title in TITLES.items()]
    return "\n".join([head, *filter(None, parts)])


def _count(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    run = [row for row in rows if "exact" in row]
    exact, heads = sum(row["exact"] for row in run), sum(row["exact"] and row["heads"] for row in run)
    return f"| {title} | {len(rows)} | {len(run)} | {exact} | {heads} |"


def _part(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    table = [
        f"## {title}",
        "",
        "| `model_type` | projections | exact | heads | in place | experts | LoRA | GGUF |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(row) for row in rows if "exact" in row),
    ]
    missing = [f"`{row['model_type']}` ({_shortly(row['problem'])})" for row in rows if "exact" not in row]
    not_run = [f"\nNot run so small: {', '.join(missing)}."] if missing else []
    names = dict.fromkeys(row["model_type"] for row in rows if row["model_type"] in LEFT_OUT)
    left_out = [f"\nLeft out: {'; '.join(f'`{name}`, {LEFT_OUT[name]}' for name in names)}."] if names else []
    return "\n".join([*table, *not_run, *left_out, ""])


def _row(row: Mapping[str, Any]) -> str:
    cells = [
        f"`{row['model_type']}`",
        " ".join(row["projections"]) or "by name",
        _word(row["exact"]) + ("" if row["dtype"] == "float64" else f" ({row['dtype']})"),
        _word(row["heads"]),
        f"{row['contiguous']} of {row['slices']}",
        _word(row["experts"]),
        _word(row["lora"]),
        _word(row["llama_cpp"]),
    ]
    return f"| {' | '.join(cells)} |"


def _word(value: bool) -> str:
    return "yes" if value else "–"


def _shortly(problem: str) -> str:
    kind, _, text = problem.partition(": ")
    if "requires the" in text:
        return f"needs {text.partition('requires the ')[2].split()[0]}"
    return {"S2FTError": "too large"}.get(kind, "not built or called by our general rules")
