"""A cache of prepared data, by content: the same examples, tokenizer and settings are prepared once.

HF_DATASETS_CACHE/s2ft/KEY.arrow    memory-mapped, so the tokens need not fit in memory; may be deleted at any time
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from s2ft.data.examples import data_digest
from s2ft.data.mapped import cache_folder

FEWEST = 10_000  # examples; fewer are prepared in a few seconds
_MADE_BY = ("s2ft", "transformers", "tokenizers")  # what renders, tokenises and cuts


def cache_options(examples: Dataset, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> dict[str, Any]:
    """Options for `Dataset.map`: where its result is kept, and found again; few examples are kept in memory alone.

    Args:
        examples: That are tokenised.
        tokenizer: A fast one; of others the content cannot be told, and nothing is kept.
        settings: Whatever else the result depends on.
    """
    if len(examples) < FEWEST or not tokenizer.is_fast:
        return {"keep_in_memory": True}
    key = cache_key(examples, tokenizer, **settings)
    file = str(cache_folder() / f"{key}.arrow")
    return {"cache_file_name": file, "new_fingerprint": key, "load_from_cache_file": True}


def cache_key(examples: Dataset, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> str:
    """A digest of all that the tokens depend on, as 32 hex digits."""
    content = {
        "columns": sorted(examples.column_names),
        "examples": data_digest(examples),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "made by": {name: version(name) for name in _MADE_BY},
        **settings,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]
