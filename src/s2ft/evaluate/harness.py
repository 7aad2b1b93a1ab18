"""The tasks of EleutherAI's lm-evaluation-harness, on our models and adapters. Its prompts and its scoring, not ours.

Source: https://github.com/EleutherAI/lm-evaluation-harness (`simple_evaluate` and `HFLM`, its public interface).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from s2ft.common.errors import S2FTError
from s2ft.evaluate.engines import in_words
from s2ft.evaluate.subjects import Models, find_subjects
from s2ft.runtime.environment import environment
from s2ft.runtime.failures import clear_failures, is_out_of_memory
from s2ft.runtime.precision import choose_precision


def run_harness(
    model: str,
    tasks: Sequence[str],
    adapters: Sequence[str] = (),
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    precision: str = "auto",
) -> dict[str, Any]:
    """Evaluates the base, or each adapter by itself.

    Args:
        model: The base: a folder or a name on the Hub.
        tasks: Names of the harness.
        adapters: Folders or Hub names.
        data: A folder with tasks of one's own, as the harness describes them (YAML).
        limit: The first so many questions of each task.
        batch_size: Prompts that go through the model at once.
        precision: Of the weights: auto, bf16, fp32.

    Returns:
        `{"environment", "settings", "rows"}`, a row for each model, task and metric.

    Raises:
        S2FTError: if the harness is not installed, or refuses a task.
    """
    lm_eval = find_harness()
    subjects = find_subjects(adapters)
    dtype, _ = choose_precision(precision)
    manager = lm_eval.tasks.TaskManager(include_path=data)
    _check_tasks(tasks, manager)
    rows: list[dict[str, Any]] = []
    with clear_failures(f"lower batch_size={batch_size}, or take precision='bf16'", "the harness's cache"):
        models = Models(model, dtype, "transformers", batch_size)
        for subject in subjects:
            with models.loaded(subject) as live:
                ours = lm_eval.models.huggingface.HFLM(
                    pretrained=live, tokenizer=models.tokenizer, batch_size=batch_size
                )
                found = _evaluate(lm_eval, ours, tasks, manager, limit)
            rows += [{"model": subject.label, **row} for row in _rows(found)]
    settings = {"harness": "lm-eval", "version": lm_eval.__version__, "model": model, "adapters": list(adapters)}
    settings |= {"tasks": list(tasks), "limit": limit, "batch_size": batch_size, "precision": precision}
    return {"environment": environment(), "settings": settings, "rows": rows}


def find_harness() -> ModuleType:
    """The package `lm_eval`.

    Raises:
        S2FTError: if it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise S2FTError(
            f"harness='lm-eval' needs the lm-evaluation-harness: pip install 's2ft[eval]' ({error})"
        ) from None
    return lm_eval


def _check_tasks(tasks: Sequence[str], manager: Any) -> None:
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise S2FTError(
            f"task={', '.join(unknown)!r} is unknown to lm-eval; `lm-eval ls tasks` lists those that it has"
        )


def _evaluate(lm_eval: Any, model: Any, tasks: Sequence[str], manager: Any, limit: int | None) -> dict[str, Any]:
    try:
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
        )
    except Exception as error:  # a task's data set may be missing, its YAML wrong, ...
        if is_out_of_memory(error):
            raise
        raise S2FTError(f"lm-eval failed on task={', '.join(tasks)!r}: {in_words(error)}") from error
    return found


def _rows(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The harness reports "acc,none": 0.5 and "acc_stderr,none": 0.1 for each task."""
    for task, values in found["results"].items():
        count = found.get("n-samples", {}).get(task, {}).get("effective")
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{metric}_stderr,{filtered}")
                stderr = error if isinstance(error, int | float) else None
                row = {"task": task, "metric": metric, "filter": filtered, "value": value, "stderr": stderr}
                yield {**row, "questions": count}


def known_folder(data: str | None) -> str | None:
    """`data` if it is a folder.

    Raises:
        S2FTError: if it is anything else.
    """
    if data is not None and not Path(data).is_dir():
        raise S2FTError(f"data={data!r} is no folder; with --harness, it names a folder of lm-eval tasks (YAML)")
    return data
