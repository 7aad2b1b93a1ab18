"""Which of transformers' models does s2ft train, and how exactly? A tiny random one of each class, beside full autograd.

What is computed is in `lab/families`; here it becomes rows, and a page of the documentation.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from s2ft.common.errors import S2FTError, first_line
from s2ft.common.files import replaced_file
from s2ft.exports.gguf import ARCHITECTURES
from s2ft.lab.bench.report import Report
from s2ft.lab.families.check import check
from s2ft.lab.families.page import page_of
from s2ft.lab.families.tiny import KINDS, classes, tiny
from s2ft.lab.registry import TellShare

DTYPES = (torch.float64, torch.float32)  # the second, where a model's own code does not work in the first


def bench_families(
    kind: str | None = None, page: str | None = None, seed: int = 0, tell: TellShare = lambda done: None
) -> Report:
    """Checks a tiny model of every class of `kind`, or of all kinds."""
    if kind not in (None, *KINDS):
        raise S2FTError(f"kind={kind!r} is unknown; choose from {', '.join(KINDS)}")
    wanted = [(k, name, of) for k in ([kind] if kind else KINDS) for name, of in classes(k).items()]
    rows = []
    with _quietly():
        for done, (of_kind, model_type, class_name) in enumerate(wanted, start=1):
            rows.append(row_of(of_kind, model_type, class_name, seed))
            tell(done / len(wanted))
    report = Report(settings={"kind": kind, "seed": seed, "transformers": transformers.__version__}, rows=rows)
    if page is not None:
        with replaced_file(Path(page)) as aside:
            aside.write_text(page_of(report.as_dict()), encoding="utf-8")
    return report


def row_of(kind: str, model_type: str, class_name: str, seed: int = 0) -> dict[str, Any]:
    """What is found of one class; `problem` says why nothing is."""
    row: dict[str, Any] = {"kind": kind, "model_type": model_type, "class": class_name}
    for dtype in DTYPES:
        torch.manual_seed(seed)
        try:
            model = tiny(model_type, class_name, dtype)
            found = check(model, seed)
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
        }
        if found.is_exact:
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
