"""Every option of `s2ft eval`, once: the command line, its help and the checks follow from here. Needs no heavy library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from s2ft.common.errors import gathered, raise_together
from s2ft.common.outputs import check_place
from s2ft.evaluate.judge import KEY, MODEL, URL, Judge, find_judge
from s2ft.evaluate.tasks import DECODING, SUITES, Decoding, Task, find_tasks, missing
from s2ft.format.folder import WEIGHTS_FILE
from s2ft.runtime.lookup import check_folder
from s2ft.runtime.options import Count, Options, one_of

PROMPTS = ("alpaca", "chat")
AUTO = "auto"
PRECISIONS = (AUTO, "bf16", "fp32")
ENGINES = ("transformers", "vllm")
BASE, ADAPTER_FILE, MODEL_FILE = "base", "adapter_config.json", "config.json"
PICKLE_FILE = "adapter_model.bin"  # as older versions of PEFT call an adapter's tensors
_LENGTHS = ", ".join(f"{suite} {decoding.max_new_tokens}" for suite, decoding in DECODING.items())
_BEAMS = ", ".join(f"{suite} {decoding.beams}" for suite, decoding in DECODING.items())


JudgeUrl = Annotated[str | None, Field(description=f"Judge of MT-Bench, such as https://host/v1; unless given: ${URL}")]
JudgeModel = Annotated[str | None, Field(description=f"Its model; unless given: ${MODEL}. Its key is ${KEY}")]


class HarnessOptions(Options):
    """The options of `s2ft eval --harness`; all others of `s2ft eval` belong to its own tasks."""

    model: str = Field(description="Base model: a folder or a name on the Hub")
    adapter: list[str] = Field(
        [], description="Adapter: a folder or a Hub name; repeat to evaluate several, each by itself"
    )
    task: list[str] = Field([], description="One task; may be repeated")
    data: str | None = Field(None, description="Folder with tasks of your own, as the harness describes them (YAML)")
    limit: Count | None = Field(None, description="Use only the first N questions of each task")
    batch_size: Count = Field(8, description="Prompts that go through the model at once")
    precision: Annotated[str, one_of(*PRECISIONS)] = Field(AUTO, description=f"Of the weights: {', '.join(PRECISIONS)}")

    def input_problems(self) -> list[str]:
        """No task, data that are no folder, a missing model or adapter. The harness itself checks the names of tasks."""
        problems = [] if self.task else ["task: name at least one task of lm-eval"]
        if self.data is not None and not Path(self.data).is_dir():
            problems.append(
                f"data={self.data!r} is no folder; with --harness, it names a folder of lm-eval tasks (YAML)"
            )
        return [*problems, *gathered(*_of_models(self))]


class EvalOptions(HarnessOptions):
    """All options of an evaluation on our tasks; `parse` looks for the files that they name."""

    data: str = Field(description="Folder with dataset/NAME/test.json (MT-Bench: question.jsonl); or Hub name")
    output: Path = Field(description="Folder for the answers; what it holds is not asked again")
    suite: list[str] = Field([], description=f"{', '.join(SUITES)}; may be repeated")
    beams: Count | None = Field(None, description=f"1 is greedy; unless given: {_BEAMS}")
    max_new_tokens: Count | None = Field(None, description=f"Of an answer; unless given: {_LENGTHS}")
    prompt: Annotated[str, one_of(AUTO, *PROMPTS)] = Field(
        AUTO, description="alpaca, chat (the model's chat template), or auto: as the adapter was trained"
    )
    engine: Annotated[str, one_of(*ENGINES)] = Field(
        "transformers", description="transformers, or vllm where installed"
    )
    judge_url: JudgeUrl = None
    judge_model: JudgeModel = None

    @property
    def tasks(self) -> list[Task]:
        """The tasks of `suite` and `task`, each once.

        Raises:
            S2FTError: for each unknown name.
        """
        return find_tasks([*(self.suite or []), *(self.task or [])])

    def decoding(self, task: Task) -> Decoding:
        """How the answers to a task are written."""
        usual = DECODING[task.suite]
        return Decoding(self.beams or usual.beams, self.max_new_tokens or usual.max_new_tokens)

    def judge(self) -> Judge | None:
        """Who rates the answers; None where nothing is rated, or no judge is known.

        Raises:
            S2FTError: if a judge is known by half, or cannot be one.
        """
        return find_judge(self.judge_url, self.judge_model) if any(task.rule is None for task in self.tasks) else None

    def input_problems(self) -> list[str]:
        """What is wrong with tasks, data and output, with the models that are named, and with the judge."""
        return [*self.task_problems(), *gathered(*_of_models(self))]

    def task_problems(self) -> list[str]:
        """Unknown tasks, missing data, an output that cannot be written, an incomplete judge."""
        problems = [] if self.suite or self.task else ["task: name at least one task or suite"]
        checks: list[Callable[[], object]] = [self._check_data, self.judge]
        if self.output is not None:
            checks.append(partial(check_place, self.output))
        return list(dict.fromkeys([*problems, *gathered(*checks)]))  # two of the checks find unknown tasks

    def _check_data(self) -> None:
        raise_together([] if self.data is None else missing(self.tasks, self.data))


@dataclass(frozen=True)
class Subject:
    """The base model (`adapter` None) or an adapter, under the name that its results go by."""

    label: str
    adapter: str | None


def find_subjects(adapters: Sequence[str]) -> list[Subject]:
    """The base model if no adapter is given; else each adapter, named by its folder.

    Raises:
        S2FTError: if a folder holds no adapter, or two have the same name.

    Example:
        >>> find_subjects([])
        [Subject(label='base', adapter=None)]
    """
    subjects = [
        Subject(Path(name).resolve().name if Path(name).is_dir() else Path(name).name, name) for name in adapters
    ]
    labels = [subject.label for subject in subjects]
    raise_together(
        [
            *(problem for name in adapters if (problem := _no_adapter(name))),
            *(f"adapter={name!r}: its results would go by {BASE!r}, the base model's name; rename it"
              for name, label in zip(adapters, labels, strict=True) if label == BASE),
            *(f"adapter: two go by {label!r}; results are kept by the folder's name, so give them different ones"
              for label in sorted({label for label in labels if labels.count(label) > 1})),
        ]
    )  # fmt: skip
    return subjects or [Subject(BASE, None)]


def _of_models(options: HarnessOptions) -> list[Callable[[], object]]:
    checks: list[Callable[[], object]] = [partial(find_subjects, options.adapter or [])]
    return [partial(check_folder, options.model), *checks] if options.model is not None else checks


def _no_adapter(name: str) -> str | None:
    path = Path(name)
    if path.is_dir() and not (path / ADAPTER_FILE).is_file():
        return f"adapter={name!r} is a folder without {ADAPTER_FILE}, so it holds no adapter"
    if (path / PICKLE_FILE).is_file() and not (path / WEIGHTS_FILE).is_file():
        return f"adapter={name!r} holds a pickle, {PICKLE_FILE}, which is not opened; save it as {WEIGHTS_FILE}"
    if not path.is_dir() and (path.exists() or name.startswith((".", "/", "~"))):
        return f"adapter={name!r} is not a folder; name the folder of an adapter, or an adapter on the Hub"
    return None
