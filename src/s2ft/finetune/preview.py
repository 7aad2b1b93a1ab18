"""What a run makes of its data, without the run: what each source is taken for, an example as the model reads it, counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pydantic import Field

from s2ft.common.errors import S2FTError, gathered
from s2ft.data.sources import check_source
from s2ft.finetune.objectives import OBJECTIVES
from s2ft.finetune.options import DataOptions
from s2ft.finetune.values import Positive
from s2ft.runtime.lookup import check_folder
from s2ft.runtime.options import Options


class PreviewOptions(DataOptions, Options):
    """All options of a preview."""

    example: Positive = Field(1, description="Which example is shown, of those that are usable")

    def input_problems(self) -> list[str]:
        """Data and model that are not there."""
        sources = [partial(check_source, source) for source in self.data or ()]
        return gathered(*sources, *([partial(check_folder, self.model)] if self.model else ()))


@dataclass(frozen=True)
class Preview:
    """What `s2ft data preview` shows; for objectives whose prompts are answered later, without tokens."""

    taken: Sequence[str]  # what each source is taken for
    examples: int
    usable: int  # rows: a long text without a prompt makes several
    empty: int
    too_long: int
    shortened: int
    endless: int
    parted: int
    alike: int
    max_length: int
    tokens: dict[str, int] | None  # of a row: median, p95, longest; of all: total, learned
    example: list[tuple[str, bool]]  # pieces of text, each with whether it is learned

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        pieces = [{"text": text, "learned": learned} for text, learned in self.example]
        return {**asdict(self), "example": pieces}


def preview(options: PreviewOptions) -> Preview:
    """Reads and tokenises the data as a run would.

    Raises:
        S2FTError: as a run, or if there are fewer usable examples than the one that is to be shown.
    """
    from s2ft.data.examples import load
    from s2ft.finetune.arguments import longest
    from s2ft.runtime.models import empty_model, load_tokenizer

    objective = OBJECTIVES[options.objective]
    loaded = load(options.data, options.limit, objective.read(), options.map)
    tokenizer = load_tokenizer(options.model)
    tokens = objective.tokenize(loaded.examples, tokenizer, longest(options, empty_model(options.model)))
    if options.example > len(tokens.dataset):
        raise S2FTError(f"example={options.example}, but {len(tokens.dataset)} are usable; take one of these")
    dropped = {name: getattr(tokens, name) for name in ("empty", "too_long", "shortened", "endless", "parted", "alike")}
    return Preview(
        taken=[line for reading in loaded.readings for line in reading.lines()],
        examples=len(loaded.examples) // objective.read().together,
        usable=len(tokens.dataset),
        **dropped,
        max_length=tokens.max_length,
        tokens=_counted(tokens.dataset),
        example=_pieces(tokens.dataset[options.example - 1], tokenizer),
    )


def _counted(rows: Any) -> dict[str, int] | None:  # rows: a Dataset
    import numpy as np

    from s2ft.data.tokens import IGNORED

    if "input_ids" not in rows.column_names:
        return None
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    learned = sum(len(labels) - labels.count(IGNORED) for labels in rows["labels"])
    at = {name: int(np.percentile(lengths, share)) for name, share in (("median", 50), ("p95", 95), ("longest", 100))}
    return {**at, "total": int(lengths.sum()), "learned": learned}


def _pieces(row: dict[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
    from s2ft.data.masks import spans

    return spans(row, tokenizer) if "input_ids" in row else [(str(row["prompt"]), False)]
