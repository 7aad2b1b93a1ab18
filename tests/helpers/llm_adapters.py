"""A small folder laid out like LLM-Adapters': a few questions for each task, and worked problems."""

import json
from pathlib import Path

from s2ft.evaluate.tasks import TASKS

GOLD = {"boolq": ("true", "false"), "winogrande": ("option1", "option2"), "aqua": ("A", "B")}


def write_llm_adapters(folder: Path, tasks: set[str], problems: int = 0) -> str:
    """train.json and test.json of each task, 60 records each, and so many worked problems; returns the folder."""
    for name in tasks:
        for side in ("train", "test"):
            rows = [_record(name, side, number) for number in range(60)]
            _write(folder / "dataset" / TASKS[name].folder / f"{side}.json", rows)
    if problems:
        rows = [
            {"instruction": f"{n} and {n}?", "input": "", "output": f"The answer is {2 * n}.", "answer": str(2 * n)}
            for n in range(problems)
        ]
        _write(folder / "ft-training_set" / "math_data.json", rows)
    return str(folder)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def _record(name: str, side: str, number: int) -> dict[str, str]:
    if TASKS[name].suite == "arithmetic" and name not in GOLD:
        return {"instruction": f"{name} {side} {number}?", "input": "", "output": "", "answer": str(number)}
    first, other = GOLD.get(name, ("answer1", "answer2"))
    gold = other if number % 3 else first
    choices = "" if name in ("boolq", "aqua") else f"\n\n{first[:-1].title()}1: one {first[:-1].title()}2: two"
    asked = f"Please answer the question: {name} {side} {number}?{choices}\n\nAnswer format: {first}/{other}"
    return {"instruction": asked, "input": "", "output": f"the correct answer is {gold}", "answer": gold}
