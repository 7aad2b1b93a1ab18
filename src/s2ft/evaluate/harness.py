"""The tasks of EleutherAI's lm-evaluation-harness, on our models and adapters. Its prompts and its scoring, not ours.

Source: https://github.com/EleutherAI/lm-evaluation-harness (`simple_evaluate` and `HFLM`, its public interface).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from s2ft.common.errors import S2FTError
from s2ft.evaluate.engines import in_words
from s2ft.evaluate.options import HarnessOptions, find_subjects
from s2ft.evaluate.subjects import Models
from s2ft.runtime.environment import environment
from s2ft.runtime.failures import clear_failures, is_out_of_memory
from s2ft.runtime.precision import choose_precision


def run_harness(options: HarnessOptions) -> dict[str, Any]:
    """Evaluates the base, or each adapter by itself.

    Returns:
        `{"environment", "settings", "rows"}`, a row for each model, task and metric.

    Raises:
        S2FTError: if an option is wrong, the harness is not installed, or refuses a task.
    """
    lm_eval = find_harness()
    dtype, _ = choose_precision(options.precision)
    manager = lm_eval.tasks.TaskManager(include_path=options.data)
    _check_tasks(options.task, manager)
    rows: list[dict[str, Any]] = []
    advice = f"lower batch_size={options.batch_size}, or take precision='bf16'"
    with clear_failures(advice, "the harness's cache"):
        models = Models(options.model, dtype, "transformers", options.batch_size)
        for subject in find_subjects(options.adapter):
            with models.loaded(subject) as live:
                ours = lm_eval.models.huggingface.HFLM(
                    pretrained=live, tokenizer=models.tokenizer, batch_size=options.batch_size
                )
                found = _evaluate(lm_eval, ours, options.task, manager, options.limit)
            rows += [{"model": subject.label, **row} for row in _rows(found)]
    return {"environment": environment(), "settings": _settings(lm_eval, options), "rows": rows}


def _settings(lm_eval: ModuleType, options: HarnessOptions) -> dict[str, Any]:
    settings = {
        "harness": "lm-eval",
        "version": lm_eval.__version__,
        "model": options.model,
        "adapters": options.adapter,
    }
    settings |= {"tasks": options.task, "limit": options.limit, "batch_size": options.batch_size}
    return {**settings, "precision": options.precision}


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
    found: ModuleType = lm_eval
    return found


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
