"""The README of a result, which the Hub shows: how to load it, above all that `import s2ft` comes before an S²FT adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from s2ft.data.sources import HubName, kind_of_file
from s2ft.evaluate.tally import percent
from s2ft.finetune.card import Card
from s2ft.finetune.methods import find_method
from s2ft.finetune.objectives import OBJECTIVES

_TEXT = """---
{head}
---

# {title}

Trained by `s2ft train --method {method}{objective}; [run.md](run.md) says how.{note}

```python
{code}
```

{size}

## Figures

{figures}
"""

_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{base}"
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, "{place}")"""

_PADDING = "\nmodel.config.pad_token_id = tokenizer.pad_token_id  # a score is read at the last token before it"

_END = (
    "Its answers end with `{end}`, as the chat template writes it, which is not the tokenizer's end of text; so pass "
    "`eos_token_id=tokenizer.convert_tokens_to_ids({end!r})` to `generate`, unless the base's generation config names it."
)

_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}")
model = AutoModelForCausalLM.from_pretrained("{place}")"""


_PICTURES = {"loss.png": "Training loss", "channels.png": "Channels that change, layer by layer"}


def model_card(card: Card, pictures: Sequence[str] = ()) -> str:
    """The text of the README of a run.

    Args:
        card: The run card.
        pictures: Files beside it that are shown.
    """
    options = card["options"]
    how = find_method(options["method"])
    texts = _of_a_model(card, how.title) if how.leaves_model else _of_an_adapter(card, how.title)
    if not OBJECTIVES[options["objective"]].answers:
        texts["code"] = texts["code"].replace("AutoModelForCausalLM", "AutoModelForSequenceClassification")
        texts["code"] = texts["code"].replace(
            "from_pretrained(base)\nmodel", "from_pretrained(base, num_labels=1)\nmodel"
        )
        texts["code"] += _PADDING
    if how.ours:
        texts["note"] = " PEFT knows the method once `s2ft` is imported:"
        texts["code"] = "import s2ft  # first: without it, PEFT stops at KeyError: 'S2FT'\n" + texts["code"]
        texts["size"] = f"It changes {_share(card)}, and refuses any base but its own."
    if (end := card["data"].get("answer_end")) is not None and not how.leaves_model:
        texts["size"] += f"\n\n{_END.format(end=end)}"
    objective = options["objective"]
    told = "`" if objective == "sft" else f" --objective {objective}` ({OBJECTIVES[objective].title})"
    shown = [f"![{title}]({name})" for name, title in _PICTURES.items() if name in pictures]
    return _TEXT.format(
        **{
            "note": "",
            "head": _head(card),
            "method": options["method"],
            "objective": told,
            "figures": "\n\n".join(["\n".join(_figures(card)), *shown]),
            **texts,
        }
    )


def _head(card: Card) -> str:
    """What the Hub reads. A base or data in a local folder is not named to it: it would look for them."""
    options, scores = card["options"], card.get("scores", {})
    whole = find_method(options["method"]).leaves_model
    base = options["model"]
    results = [
        EvalResult("text-generation", task, task, "accuracy", round(score["tuned"], 4))
        for task, score in scores.items()
        if score["tuned"] is not None
    ]
    named = [HubName.parse(name).name for name in options["data"] if not _is_local(name)]
    head = ModelCardData(
        base_model=None if _is_local(base) else base,
        datasets=[name.removeprefix("hf://datasets/") for name in named] or None,
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation" if OBJECTIVES[options["objective"]].answers else "text-classification",
        tags=[options["method"], *([] if whole else ["peft"]), "s2ft-train"],
        metrics=["accuracy"] if results else None,
        eval_results=results or None,
        model_name=(options.get("push_to_hub") or options["method"]).rpartition("/")[2],
    )
    return str(head.to_yaml()).strip()


def _is_local(name: str) -> bool:
    """Whether a name stands for something on this machine."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or kind_of_file(Path(name)) is not None


def _figures(card: Card) -> list[str]:
    """The table of what came out."""
    training = card["training"]
    rows = {
        "training loss, at the end": training.get("final_loss"),
        "held-out loss, the lowest": training.get("best_loss"),
        "learning rate": training.get("learning_rate"),
        "steps": training.get("steps"),
        "seconds": training.get("seconds"),
    }
    lines = [f"| {name} | {value:.4g} |" for name, value in rows.items() if value is not None]
    lines += [
        f"| {task}, base → tuned | {percent(score['base'])} → {percent(score['tuned'])} of {score['questions']} questions |"
        for task, score in card.get("scores", {}).items()
    ]
    return ["| | |", "|---|---|", *lines]


def _share(card: Card) -> str:
    size = card.get("adapter") or card["model"]
    trainable, total = size["trainable_parameters"], size["model_parameters"]
    return f"{trainable:,} of the model's {total:,} parameters ({trainable / total:.2%})"


def _place(card: Card) -> str:
    """What the code loads: the name on the Hub, where there is one."""
    return card["options"].get("push_to_hub") or "path/to/this/folder"


def _of_a_model(card: Card, title: str) -> dict[str, str]:
    return {
        "title": f"{card['options']['model']}, trained by {title}",
        "code": _MODEL.format(place=_place(card)),
        "size": f"Trained at a time: {_share(card)}.",
    }


def _of_an_adapter(card: Card, title: str) -> dict[str, str]:
    base = card["options"]["model"]
    return {
        "title": f"{'An' if title == 'S²FT' else 'A'} {title} adapter for {base}",
        "code": _ADAPTER.format(base=base, place=_place(card)),
        "size": f"Trained: as many as {_share(card)}.",
    }
