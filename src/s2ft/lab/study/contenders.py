"""Who is compared: each contender says what it trains; its learning rate is chosen on the validation split.

    vanilla     nothing                             the base, to compare with
    full        every weight
    lora, dora  low-rank factors on all linear layers   ┐
    shira       scattered entries of all linear layers  ├ about `budget` of the parameters
    s2ft        slices of o and down                    ┘

A budget is a share of the model's parameters. SHiRA (arXiv 2406.13175) is PEFT's; its mask is drawn anew for each seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from peft import PeftConfig, ShiraConfig
from transformers import PreTrainedModel

from s2ft.demo.skills import OLD_SKILLS, SKILLS, STUDY_SKILLS, Example, Skill
from s2ft.finetune.lora import equal_rank
from s2ft.finetune.methods import METHODS
from s2ft.finetune.options import TrainOptions
from s2ft.format.config import S2FTConfig
from s2ft.lab.study.runs import Runs
from s2ft.lab.study.training import (
    Tuned,
    Workload,
    accuracy,
    calibration,
    fine_tune,
    fresh_base,
    tokenizer_of,
    tokens_of,
)
from s2ft.lab.study.tuning import best_rate
from s2ft.selection.select import select

TUNING_SEED = 1000  # differs from the seeds of reported runs


@dataclass(frozen=True)
class Contender:
    """A method with its settings."""

    name: str
    method: str  # vanilla, shira, or one of `s2ft train`'s: s2ft, full, lora, dora
    budget: float = 0.0
    strategy: str = "random"
    subset: str = "largest"

    def config(
        self, model: PreTrainedModel, tokens: Dataset, workload: Workload, seed: int, avoid: Sequence[str] = ()
    ) -> PeftConfig | None:
        """The PEFT config; None where the model's own weights are trained.

        Args:
            avoid: For s2ft: folders of adapters whose channels are not to be chosen.
        """
        if self.method == "s2ft":
            return self._channels(model, tokens, workload, seed, avoid)
        parameters = round(self.budget * model.num_parameters())
        if self.method == "shira":
            rank = equal_rank(model, parameters)
            return ShiraConfig(r=rank, target_modules="all-linear", random_seed=seed, task_type="CAUSAL_LM")
        method = METHODS[self.method]
        options = TrainOptions(model="m", data=["d"], output="o", **method.of_size(model, parameters))
        return method.peft_config(options, model, None)

    def _channels(
        self, model: PreTrainedModel, tokens: Dataset, workload: Workload, seed: int, avoid: Sequence[str]
    ) -> S2FTConfig:
        config = S2FTConfig(
            budget=self.budget,
            strategy=self.strategy,
            subset=self.subset,
            seed=seed if self.strategy == "random" else None,
            avoid=list(avoid) or None,
            task_type="CAUSAL_LM",
        )
        return select(model, config, [calibration(tokens, workload.batch_size, tokenizer_of(model))]).config


VANILLA = Contender("vanilla", "vanilla")  # the base as it is


def fit(
    contender: Contender, task: str, workload: Workload, rate: float, seed: int, avoid: Sequence[str] = ()
) -> Tuned:
    """A fresh base, tuned by `contender` on the `fit` split of a study's skill."""
    examples = STUDY_SKILLS[task].examples(workload.train_examples, seed, split="fit")
    return fit_examples(contender, examples, workload, rate, seed, avoid)


def fit_examples(
    contender: Contender,
    examples: Sequence[Example],
    workload: Workload,
    rate: float,
    seed: int,
    avoid: Sequence[str] = (),
) -> Tuned:
    """A fresh base, tuned by `contender` on `examples`."""
    tokens, model = tokens_of(examples), fresh_base()
    return fine_tune(model, tokens, contender.config(model, tokens, workload, seed, avoid), workload, rate, seed)


def train_and_score(
    contender: Contender, task: str, workload: Workload, rate: float, seed: int, tests: Mapping[str, list[Example]]
) -> dict[str, Any]:
    """What a run leaves: parameters, training loss, and the accuracy on each test."""
    if contender.method == "vanilla":
        return {"trainable": 0, "loss": None, "scores": scores_on(fresh_base(), tests)}
    tuned = fit(contender, task, workload, rate, seed)
    return {"trainable": tuned.trainable, "loss": tuned.final_loss, "scores": scores_on(tuned.model, tests)}


def scores_on(model: Any, tests: Mapping[str, list[Example]]) -> dict[str, float]:
    """The accuracy on each test."""
    return {name: accuracy(model, examples) for name, examples in tests.items()}


def tests_of(skills: Mapping[str, Skill], workload: Workload, seed: int) -> dict[str, list[Example]]:
    """Test examples of each skill; another seed draws others."""
    return {name: skill.examples(workload.test_examples, seed, split="test") for name, skill in skills.items()}


def old_skills() -> dict[str, Skill]:
    """The skills that the base model masters."""
    return {name: SKILLS[name] for name in OLD_SKILLS}


def tuned_rate(runs: Runs, contender: Contender, task: str, rates: Sequence[float], workload: Workload) -> float:
    """The rate whose run is best on the validation split, looked for from `rates` on."""
    validation = STUDY_SKILLS[task].examples(workload.test_examples, TUNING_SEED, split="validation")
    settings = {"tuning": asdict(contender), "task": task, "recipe": asdict(workload)}

    def run(rate: float) -> dict[str, Any]:
        return train_and_score(contender, task, workload, rate, TUNING_SEED, {task: validation})

    return best_rate(runs, rates, settings, run, lambda result: float(result["scores"][task]))
