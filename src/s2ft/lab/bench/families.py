"""Which of transformers' models does s2ft train, and how exactly? A tiny random one of each class, beside full autograd.

What is computed is in `lab/families`; here it becomes rows, and a page of the documentation.
"""

from __future__ import annotations

import json
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from s2ft.common.errors import S2FTError, first_line, raise_together
from s2ft.common.files import replaced_file
from s2ft.common.outputs import check_writable
from s2ft.exports.gguf import ARCHITECTURES
from s2ft.lab.bench.report import Report
from s2ft.lab.families.check import MOST, MOST_IN_PLACE, check
from s2ft.lab.families.page import page_of
from s2ft.lab.families.steps import training_error
from s2ft.lab.families.tiny import KINDS, classes, tiny
from s2ft.lab.registry import TellShare

DTYPES = (torch.float64, torch.float32)  # the second, where a model's own code does not work in the first


def bench_families(
    kind: str | None = None,
    page: str | None = None,
    drawn: int | None = None,
    seed: int = 0,
    kept: str | None = None,
    tell: TellShare = lambda done: None,
) -> Report:
    """Checks a tiny model of every class of `kind`, or of all kinds.

    Args:
        kind: One of `KINDS`.
        page: Where the table goes.
        drawn: Check so many classes, drawn by the seed, and train each for a few steps too.
        seed: Of weights, inputs, channels, and of what is drawn.
        kept: A file that gets each row as it is found; those that ran are taken from it, if they are of the same versions.
        tell: Told the share that is done.
    """
    check_writable(None if page is None else Path(page), "page")
    check_writable(None if kept is None else Path(kept), "kept")
    if kind not in (None, *KINDS):
        raise S2FTError(f"kind={kind!r} is unknown; choose from {', '.join(KINDS)}")
    wanted = [(k, name, of) for k in ([kind] if kind else KINDS) for name, of in classes(k).items()]
    if drawn is not None:
        raise_together([] if 0 < drawn <= len(wanted) else [f"drawn={drawn} must be from 1 to {len(wanted)}"])
        raise_together([f"page={page!r} needs all classes; leave out drawn={drawn}"] if page else [])
        wanted = random.Random(seed).sample(wanted, drawn)
    rows, found = [], _Kept(kept, {"seed": seed, "steps": drawn is not None, **_versions()})
    with _quietly():
        for done, one in enumerate(wanted, start=1):
            rows.append(found.row(one) or found.keep(row_of(*one, seed, steps=drawn is not None)))
            tell(done / len(wanted))
    report = Report(
        settings={"kind": kind, "drawn": drawn, "seed": seed, "transformers": transformers.__version__}, rows=rows
    )
    if page is not None:
        with replaced_file(Path(page)) as aside:
            aside.write_text(page_of(report.as_dict()), encoding="utf-8")
    return report


def row_of(kind: str, model_type: str, class_name: str, seed: int = 0, steps: bool = False) -> dict[str, Any]:
    """What is found of one class, with `steps` also of a few steps of training; `problem` says why nothing is."""
    row: dict[str, Any] = {"kind": kind, "model_type": model_type, "class": class_name}
    for dtype in DTYPES:
        torch.manual_seed(seed)
        try:
            model = tiny(model_type, class_name, dtype)
            found = check(model, seed)
            trained = {"trained_error": training_error(model, seed)} if steps else {}
        except Exception as error:
            problem = {"problem": f"{type(error).__name__}: {first_line(error)}"}
            row = row if "exact" in row else {**row, **problem}
            continue
        row.pop("problem", None)
        row |= {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(dtype).removeprefix("torch."),
            "exact": found.is_exact,
            "projections": [name.removesuffix("_proj") for name in found.projections],
            "heads": found.coupled,
            "contiguous": found.contiguous,
            "slices": found.contiguous + len(found.gathered),
            "gathered": found.reasons,
            "gradient_error": found.gradient,
            "in_place_error": found.in_place,
            "experts": found.experts,
            "lora": found.lora,
            "llama_cpp": model_type in ARCHITECTURES,
            **trained,
        }
        row["exact"] &= trained.get("trained_error", 0.0) <= max(MOST_IN_PLACE, MOST[dtype])
        if row["exact"]:
            break
    return row


def families_line(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is printed."""
    if "problem" in row:
        return {"model": row["model_type"], "exact": "not run", "projections": row["problem"][:60]}
    return {
        "model": row["model_type"],
        "exact": "yes" if row["exact"] else "no",
        "projections": " ".join(row["projections"]),
        "in place": f"{row['contiguous']} of {row['slices']}",
        "gradient": f"{row['gradient_error']:.0e}",
    }


class _Kept:
    """Rows in a file, a line each, with what they depend on.

    Args:
        path: The file, which need not be there; None: nothing is kept.
        settings: What a row depends on beside its class.

    Raises:
        S2FTError: if a line of it is no row.
    """

    def __init__(self, path: str | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = Path(path) if path else None, settings
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path and self.path.exists() else []
        self._rows = dict(filter(None, (self._read(number, line) for number, line in enumerate(lines, start=1))))

    def _read(self, number: int, line: str) -> tuple[tuple[str, ...], dict[str, Any]] | None:
        try:
            settings, row = (json.loads(line)[name] for name in ("settings", "row"))
            place = (row["kind"], row["model_type"], row["class"])
        except (ValueError, TypeError, KeyError):
            raise S2FTError(
                f"{self.path}:{number}: is no row of this benchmark; remove the line, or name another file"
            ) from None
        return (place, row) if settings == self.settings and "problem" not in row else None

    def row(self, place: tuple[str, str, str]) -> dict[str, Any] | None:
        """The row of (kind, model_type, class) if it is there and ran."""
        return self._rows.get(place)

    def keep(self, row: dict[str, Any]) -> dict[str, Any]:
        """Adds the row to the file, and returns it."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"settings": self.settings, "row": row}) + "\n")
        return row


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("s2ft", "torch", "transformers", "peft")}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what models say of kernels that they would rather have."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.enable_progress_bar()
        transformers.logging.set_verbosity(before)
