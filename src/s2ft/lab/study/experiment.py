"""One run on a real model: a contender trained on a task, and what is measured of it. Settings in, result out.

    {"contender", "task", "rate", "seed", "recipe", "measured"}      a training, and what of `MEASURED` is asked of it
    {"fusion", "disjoint", "rates", "seed", "recipe"}                two trainings, and their adapters fused
    {"options", "task", "examples", "seed"}                          `s2ft train` itself, with these options; measured: "test"

Beside these stands "data", a digest of what is trained on and asked: runs on other data are other runs.

All weights are fp32, whatever the machine multiplies fastest: runs of several machines can be put beside each other, and no
method is favoured by the precision.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from functools import cache
from io import StringIO
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from s2ft.common.errors import S2FTError
from s2ft.demo.real import documentation
from s2ft.demo.skills import Split
from s2ft.evaluate.answers import score_row
from s2ft.evaluate.engines import TransformersEngine, prompt_ids
from s2ft.evaluate.likelihood import accuracy, load_choices, perplexity
from s2ft.evaluate.tasks import DECODING, TASKS
from s2ft.finetune.options import parse_options
from s2ft.finetune.train import train
from s2ft.finetune.trainer import DivergedError
from s2ft.format.config import S2FTConfig
from s2ft.lab.study.contenders import Contender
from s2ft.lab.study.fusion import FUSIONS, fuse_adapters
from s2ft.lab.study.material import TESTS, Example, draw, load_task, unseen_questions
from s2ft.lab.study.runs import Result, Settings
from s2ft.lab.study.training import Tuned, Workload, fine_tune, response_loss, tokenizer_of, tokens_of
from s2ft.lab.study.tuning import DIVERGED
from s2ft.runtime.models import load_model
from s2ft.training.rate import learning_rate

MOST_HELD_OUT = {"style": 200, "arithmetic": 80, "commonsense": 80}  # examples at most
QUESTIONS = {  # of each task, answered in writing: the 95% interval of the average is within ±4 points
    "arithmetic": 40,  # 6 tasks, up to 11%
    "commonsense": 130,  # 5 tasks
}
CHOICES = 130  # of each commonsense task, chosen by likelihood
MEASURED = {  # besides the loss of held-out examples
    "validation": (),
    "test": (),
    "known": ("known",),  # what the model knows and how it reads, apart from what it was trained on
    "written": ("written",),  # tests of the task, answered in writing
    "all": ("known", "written"),
}
BATCH = {"cpu": 32, "cuda": 128}  # prompts that are answered at once
READ = 32  # questions whose choices are read at once


class Experiments:
    """A real model and its data, loaded once; `Experiments(model, data)(settings)` is a run.

    Args:
        model: A folder, GGUF file or name on the Hub.
        data: LLM-Adapters' folder; None: the task `style` alone.
    """

    def __init__(self, model: str, data: str | None) -> None:
        self._model, self._data = model, data
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._base = load_model(model, torch.float32).to(self._device)
        self._tokenizer = tokenizer_of(self._base)
        self._examples = cache(lambda task: load_task(task, data))

    def __call__(self, settings: Settings) -> Result:
        """Runs what the settings say; a training that diverges is a result too."""
        kinds = {"fusion": self._fusion, "options": self._command, "contender": self._training}
        try:
            return next(run(settings) for kind, run in kinds.items() if kind in settings)
        except DivergedError as error:
            return {DIVERGED: str(error)}
        finally:
            gc.collect()  # a trainer holds on to its model in a circle
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _training(self, settings: Settings) -> Result:
        who, measured = Contender(**settings["contender"]), settings["measured"]
        if who.method == "vanilla":
            return {"trainable": 0, **self._measure(copy.deepcopy(self._base), settings["task"], measured)}
        tuned, rate = self._fit(who, settings, settings["rate"])
        counts = {"trainable": tuned.trainable, "rate": rate, "training_loss": tuned.final_loss}
        return {**counts, **self._measure(tuned.model, settings["task"], measured)}

    def _fit(
        self, who: Contender, settings: Settings, rate: float | None, avoid: Sequence[str] = (), task: str | None = None
    ) -> tuple[Tuned, float]:
        """The tuned model and its learning rate: that of `s2ft train`'s rule where none is given."""
        workload, seed = Workload(**settings["recipe"]), settings["seed"]
        examples = draw(self._examples(task or settings["task"]), "fit", workload.train_examples, seed)
        tokens, model = tokens_of(examples, self._tokenizer), copy.deepcopy(self._base)
        config = who.config(model, tokens, workload, seed, avoid)
        if rate is None:
            assert isinstance(config, S2FTConfig)
            rate = learning_rate(config, workload.steps, workload.batch_size)
        return fine_tune(model, tokens, config, workload, rate, seed), rate

    def _measure(self, model: Any, task: str, measured: str) -> Result:
        split: Split = "validation" if measured == "validation" else "test"
        held_out = draw(self._examples(task), split, MOST_HELD_OUT[task], seed=0)
        if task == "style":  # too few to be divided
            held_out = [*held_out, *draw(self._examples(task), "validation", MOST_HELD_OUT[task], seed=0)]
        found: Result = {"held_out": self._loss(model, held_out)}
        if "written" in MEASURED[measured]:
            found["written"] = self._written(model, task, QUESTIONS[task])
        if "known" in MEASURED[measured]:
            found |= self._known(model)
        return found

    def _loss(self, model: Any, examples: list[Example]) -> float:
        with torch.no_grad():
            return response_loss(model, tokens_of(examples, self._tokenizer), READ // 8)

    def _written(self, model: Any, suite: str, limit: int) -> dict[str, float]:
        """The accuracy of greedy answers on each task of a suite, and their mean.

        Raises:
            S2FTError: if an answer could not be produced: a study has no use for parts of a test.
        """
        questions = unseen_questions(suite, str(self._data)).questions
        asked = [(task, one) for task, some in questions for one in some[:limit]]
        prompts = [prompt_ids(self._tokenizer, one.prompt) for _, one in asked]
        engine = TransformersEngine(model, self._tokenizer, BATCH[self._device])  # all tasks share its batches
        answers = dict(chain.from_iterable(engine.answers(prompts, replace(DECODING[suite], beams=1))))
        if failed := {answer.error for answer in answers.values() if answer.error is not None}:
            raise S2FTError(f"answers could not be produced: {', '.join(sorted(failed))}")
        right: dict[str, list[bool]] = {}
        for place, (task, one) in enumerate(asked):
            right.setdefault(task.name, []).append(score_row(task, answers[place].text or "", one.gold)["correct"])
        found = {name: fmean(verdicts) for name, verdicts in right.items()}
        return {**found, "average": fmean(found.values())}

    def _known(self, model: Any) -> Result:
        """What the model knows and how it reads, apart from what it was trained on."""
        chosen = {
            task: accuracy(model, self._tokenizer, load_choices(TASKS[task], str(self._data), CHOICES), READ)
            for task in TESTS["commonsense"]
        }
        return {
            "chosen": {**chosen, "average": fmean(chosen.values())},
            "perplexity": perplexity(model, self._tokenizer, documentation()),
        }

    def _command(self, settings: Settings) -> Result:
        """`s2ft train` itself."""
        options, task = settings["options"], settings["task"]
        examples = draw(self._examples(task), "fit", settings["examples"], settings["seed"])
        with TemporaryDirectory() as folder, redirect_stderr(StringIO()):
            file = Path(folder, "data.json")
            file.write_text(json.dumps(examples), encoding="utf-8")
            common = {"model": self._model, "data": str(file), "output": str(Path(folder, "out")), "precision": "fp32"}
            found = train(parse_options({**common, "train_seed": settings["seed"], **options})).whole()
        training = {name: found.card["training"][name] for name in ("learning_rate", "steps", "seconds")}
        return {**training, **self._measure(found.model, task, "test")}

    def _fusion(self, settings: Settings) -> Result:
        """For each fusion, the loss of both suites' held-out examples; "alone" is each task's own adapter."""
        who, disjoint = Contender(**settings["fusion"]), settings["disjoint"]
        held_out = {suite: draw(self._examples(suite), "test", MOST_HELD_OUT[suite], seed=0) for suite in TESTS}
        found: Result = {"alone": {}}
        with TemporaryDirectory() as folder:
            folders = [Path(folder, suite) for suite in TESTS]
            for suite, place in zip(TESTS, folders, strict=True):
                avoid = [str(folders[0])] if disjoint and place != folders[0] else []
                tuned, _ = self._fit(who, settings, settings["rates"][suite], avoid, task=suite)
                tuned.model.save_pretrained(str(place))
                found["alone"][suite] = self._loss(tuned.model, held_out[suite])
            fused = fuse_adapters(folders, who.method, copy.deepcopy(self._base))
        for fusion, suite in product(FUSIONS, TESTS):
            fused.set_adapter(fusion)
            found.setdefault(fusion, {})[suite] = self._loss(fused, held_out[suite])
        return found
