"""The README of a result, which the Hub shows: how to load it, above all that `import s2ft` comes before an S²FT adapter."""

from __future__ import annotations

from pathlib import Path

from s2ft.finetune.methods import find_method
from s2ft.finetune.objectives import OBJECTIVES

_TEXT = """---
library_name: {library}
pipeline_tag: {task}
tags:
- {method}
{peft_tag}{base_line}---

# {title}

Trained by `s2ft train --method {method}{objective}; [run.md](run.md) says how.{note}

```python
{code}
```

{size}
"""

_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{base}"
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, "path/to/this/folder")"""

_PADDING = "\nmodel.config.pad_token_id = tokenizer.pad_token_id  # a score is read at the last token before it"

_END = (
    "Its answers end with `{end}`, as the chat template writes it, which is not the tokenizer's end of text; so pass "
    "`eos_token_id=tokenizer.convert_tokens_to_ids({end!r})` to `generate`, unless the base's generation config names it."
)

_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")"""


def model_card(
    base: str, trainable: int, total: int, method: str = "s2ft", objective: str = "sft", end: str | None = None
) -> str:
    """The text of the README. A base in a local folder is not named to the Hub, which would look for it.

    `end` is the token that ends an answer, where that is not the tokenizer's end of text.
    """
    how = find_method(method)
    whole, title = how.leaves_model, how.title
    share = f"{trainable:,} of the model's {total:,} parameters ({trainable / total:.2%})"
    texts = _of_a_model(base, title, share) if whole else _of_an_adapter(base, title, share)
    texts["task"] = "text-generation"
    if not OBJECTIVES[objective].answers:
        texts["task"] = "text-classification"
        texts["code"] = texts["code"].replace("AutoModelForCausalLM", "AutoModelForSequenceClassification")
        texts["code"] = texts["code"].replace(
            "from_pretrained(base)\nmodel", "from_pretrained(base, num_labels=1)\nmodel"
        )
        texts["code"] += _PADDING
    if how.ours:
        texts["note"] = " PEFT knows the method once `s2ft` is imported:"
        texts["code"] = "import s2ft  # first: without it, PEFT stops at KeyError: 'S2FT'\n" + texts["code"]
        texts["size"] = f"It changes {share}, and refuses any base but its own."
    if end is not None and not whole:
        texts["size"] += f"\n\n{_END.format(end=end)}"
    base_line = "" if Path(base).is_dir() else f"base_model: {base}\n"
    told = "`" if objective == "sft" else f" --objective {objective}` ({OBJECTIVES[objective].title})"
    return _TEXT.format(**{"note": "", "method": method, "objective": told, "base_line": base_line, **texts})


def _of_a_model(base: str, title: str, share: str) -> dict[str, str]:
    return {
        "library": "transformers",
        "title": f"{base}, trained by {title}",
        "code": _MODEL,
        "size": f"Trained at a time: {share}.",
        "peft_tag": "",
    }


def _of_an_adapter(base: str, title: str, share: str) -> dict[str, str]:
    article = "An" if title == "S²FT" else "A"
    return {
        "library": "peft",
        "title": f"{article} {title} adapter for {base}",
        "code": _ADAPTER.format(base=base),
        "size": f"Trained: as many as {share}.",
        "peft_tag": "- peft\n",
    }
