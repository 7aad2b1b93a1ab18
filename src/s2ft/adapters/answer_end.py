"""The token that ends an answer, where a chat template ends turns by another than the base's end of text.

`s2ft train` notes it in the run card beside an adapter; a merged model stops there if its generation config names it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ft.common.errors import S2FTError
from s2ft.common.files import write_json
from s2ft.common.reading import read_json, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CARD, _GENERATION = "run.json", "generation_config.json"


def noted_end(adapter: Path, load: Callable[[], PreTrainedTokenizerBase]) -> int | None:
    """The token that ends answers, as the run card beside the adapter notes it; None where it notes none.

    Args:
        adapter: The adapter's folder.
        load: Gives the base's tokenizer; asked for where there is a note, since its import takes seconds.

    Raises:
        S2FTError: if the tokenizer has no such token.
    """
    card, data = adapter / _CARD, None
    with suppress(S2FTError):  # there is none, or it is another tool's file of that name
        data = read_json(card).get("data")
    end = data.get("answer_end") if isinstance(data, dict) else None
    if end is None:
        return None
    found = load().get_vocab().get(end) if isinstance(end, str) else None
    if found is None:
        raise S2FTError(
            f"{card} says that answers end with {shown(end)}, which the base's tokenizer does not have; name the base "
            "that the adapter was trained on, or remove the note"
        )
    return int(found)


def name_end(model: Path, end: int) -> None:
    """Adds the token to those that end a text by the generation config in a model's folder; nothing changes if it is there."""
    file = model / _GENERATION
    config = read_json(file) if file.is_file() else _of_model(model)
    named = config.get("eos_token_id")
    if (ends := with_end(named, end)) != named:
        write_json(file, {**config, "eos_token_id": ends})


def with_end(named: int | list[int] | None, end: int) -> int | list[int] | None:
    """A generation config's `eos_token_id` with one more token, in front.

    Example:
        >>> with_end(2, 7), with_end([7, 2], 7), with_end(None, 7)
        ([7, 2], [7, 2], [7])
    """
    ends = [token for token in (named if isinstance(named, list) else [named]) if token is not None]
    return named if end in ends else [end, *ends]


def _of_model(model: Path) -> dict[str, Any]:
    """The generation config that transformers makes for a model which has none, out of the model's own."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)  # with its class's defaults
    made = GenerationConfig.from_model_config(config).to_diff_dict()
    return {name: value for name, value in made.items() if name != "_from_model_config"}
