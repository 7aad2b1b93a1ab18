"""The answers of a run, written by an engine and kept as they come: a JSONL file that an interrupted run goes on from.

    {"run": {"task": "gsm8k", "model": "sha256:…", ...}}                    which run the file is of
    {"id": "0", "output": "... 18.", "extracted": "18.", "error": null}     one line for each answer
    {"id": "1", "output": null, "error": "out of memory"}                   no answer: tried again by the next run
    {"id": "2", "outp                                                       cut short by a crash: removed

Of several lines with one id, the last one counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from s2ft.common.errors import S2FTError, raise_together
from s2ft.common.locks import no_empty_folders
from s2ft.evaluate.engines import Engine, prompt_ids
from s2ft.evaluate.questions import Prompt, Question, digest
from s2ft.evaluate.tasks import Decoding, Task

Row = dict[str, Any]  # {"id", ..., "error"}
MakeRow = Callable[[str, str | None, bool, str | None, Prompt], Row]  # id, text, truncated?, error, prompt


class Answers:
    """The answers in one file. Nothing in it changes until `add` is called.

    Args:
        path: The file; need not exist.
        run: What the answers depend on. A file of another run is refused.

    Raises:
        S2FTError: if the file is of another run, or is not such a file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "add.jsonl"
        >>> Answers(path, {"model": "m"}).add([{"id": "0", "output": "4", "error": None}])
        >>> list(Answers(path, {"model": "m"}).done)
        ['0']
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run = path, run
        self.rows: dict[str, Row] = {}
        self._whole = 0  # bytes of the file that are whole lines
        if path.is_file():
            self._read(path.read_bytes())

    @property
    def done(self) -> set[str]:
        """The ids that have an answer."""
        return {name for name, row in self.rows.items() if row["error"] is None}

    def add(self, rows: Iterable[Row]) -> None:
        """Appends rows and flushes them to disk, so that a killed run loses none."""
        added = list(rows)
        header = [] if self._whole else [{"run": self.run}]
        lines = b"".join(_line(value) for value in (*header, *added))
        with no_empty_folders(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._append(lines)
            except OSError:
                self._cut()
                raise
        self._whole += len(lines)
        self.rows |= {row["id"]: row for row in added}

    def _append(self, lines: bytes) -> None:
        with self.path.open("r+b" if self._whole else "wb") as file:
            file.truncate(self._whole)
            file.seek(self._whole)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def _cut(self) -> None:
        """Removes an unfinished line."""
        if self._whole:
            os.truncate(self.path, self._whole)
        else:
            self.path.unlink(missing_ok=True)

    def _read(self, content: bytes) -> None:
        lines = content.split(b"\n")[:-1]  # text after the last line break is an unfinished line
        for number, line in enumerate(lines, start=1):
            value = self._parse(line, number, is_last=number == len(lines))
            if value is None:
                return
            if number == 1:
                self._check_same(value["run"])
            else:
                self.rows[value["id"]] = value
            self._whole += len(line) + 1

    def _parse(self, line: bytes, number: int, is_last: bool) -> Row | None:
        """The line's value; None for a last line that a crash may have cut short."""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        needed = {"run"} if number == 1 else {"id", "error"}
        if isinstance(value, dict) and needed <= value.keys():
            return value
        if is_last and value is None:
            return None
        raise S2FTError(
            f"{self.path}:{number}: not a line of an evaluation's answers; name another output folder, or remove the file"
        )

    def _check_same(self, before: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self.run))
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        raise_together(
            f"{name}={now.get(name)!r}, but {self.path} holds answers with {name}={before.get(name)!r}; "
            "name another output folder, or remove the file"
            for name in names
        )


def read_answers(path: Path) -> dict[str, Row]:
    """The answers in a file by their ids, of whatever run they are."""
    rows = map(json.loads, path.read_bytes().split(b"\n")[1:-1])
    return {row["id"]: row for row in rows}


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def write_answers(
    engine: Engine,
    asked: Sequence[tuple[str, Prompt]],
    make_row: MakeRow,
    tokenizer: PreTrainedTokenizerBase,
    answers: Answers,
    decoding: Decoding,
    tell: Callable[[int], None],
) -> None:
    """Adds a row to `answers` for each of `asked` (id, prompt) without an answer; `tell` is told how many were added."""
    ids = [prompt_ids(tokenizer, prompt) for _, prompt in asked]
    done = {index for index, (name, _) in enumerate(asked) if name in answers.done}
    tell(len(done))
    for batch in engine.answers(ids, decoding, done):
        found = [(*asked[index], answer) for index, answer in batch]
        answers.add(make_row(name, one.text, one.truncated, one.error, prompt) for name, prompt, one in found)
        tell(len(found))


def answer_questions(
    engine: Engine,
    task: Task,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    answers: Answers,
    decoding: Decoding,
    tell: Callable[[int], None] = lambda count: None,
) -> None:
    """Asks the questions of a task that have no answer yet; each row holds what was read from the answer, and the verdict."""
    gold = {question.id: question.gold for question in questions}

    def make_row(name: str, text: str | None, truncated: bool, error: str | None, prompt: Prompt) -> Row:
        row: Row = {"id": name, "task": task.name, "prompt": digest(prompt), "output": text, "gold": gold[name]}
        row |= {"truncated": truncated, "error": error}
        return row if text is None else row | score_row(task, text, gold[name])

    asked = [(question.id, question.prompt) for question in questions]
    write_answers(engine, asked, make_row, tokenizer, answers, decoding, tell)


def score_row(task: Task, output: str, gold: str) -> Row:
    """What is read out of an answer, and whether it is right.

    Example:
        >>> from s2ft.evaluate.tasks import TASKS
        >>> score_row(TASKS["aqua"], "A pen costs 2. The answer is (C).", "C")
        {'extracted': 'A', 'correct': False, 'strict': 'C', 'strict_correct': True}
    """
    found: Row = {}
    readings = (("extracted", "correct", task.rule), ("strict", "strict_correct", task.strict))
    for name, verdict, rule in readings:
        if rule is not None:
            answer = rule.read(output)
            found |= {name: answer, verdict: answer is not None and rule.agree(answer, gold)}
    return found
