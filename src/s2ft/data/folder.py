"""Where files lie in a data folder laid out like LLM-Adapters', whichever of its levels is named.

    ROOT/llm-adapters/dataset/boolq/test.json     --data ROOT, ROOT/llm-adapters, or ROOT/llm-adapters/dataset
    ROOT/llm-adapters/ft-training_set/math_10k.json

Source: Hu et al., LLM-Adapters, 2023 (https://arxiv.org/abs/2304.01933).
"""

from __future__ import annotations

from pathlib import Path


def places(file: str) -> tuple[str, ...]:
    """Where a file of LLM-Adapters may lie; the last one is where it belongs.

    Example:
        >>> places("dataset/boolq/test.json")
        ('llm-adapters/dataset/boolq/test.json', 'boolq/test.json', 'dataset/boolq/test.json')
    """
    return f"llm-adapters/{file}", file.partition("/")[2], file


def find_file(folder: str, names: tuple[str, ...]) -> Path | None:
    """The first of the places at which there is a file."""
    return next((path for name in names if (path := Path(folder, name)).is_file()), None)
