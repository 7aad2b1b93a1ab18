"""The README of an adapter folder, which the Hub shows: how to load it, above all that `import s2ft` comes first."""

from __future__ import annotations

from pathlib import Path

_TEXT = """---
library_name: peft
pipeline_tag: text-generation
tags:
- s2ft
- peft
{base_line}---

# An S²FT adapter for {base}

Trained by `s2ft train`; [run.md](run.md) says how. PEFT knows the method once `s2ft` is imported:

```python
import s2ft  # first: without it, PEFT stops at KeyError: 'S2FT'
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{base}"
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

It changes {trainable:,} of the model's {total:,} parameters ({share:.2%}), and refuses any base but its own.
"""


def model_card(base: str, trainable: int, total: int) -> str:
    """The text of the README. A base in a local folder is not named to the Hub, which would look for it."""
    is_local = Path(base).is_dir()
    base_line = "" if is_local else f"base_model: {base}\n"
    return _TEXT.format(base=base, base_line=base_line, trainable=trainable, total=total, share=trainable / total)
