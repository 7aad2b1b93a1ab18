"""The objectives that `s2ft train` knows: what is learned from which data. Each is trained by TRL's own trainer.

    objective   a record of the data               is learned                                  reference
    sft         a prompt and its answer            the answer
    dpo         a prompt, a better and a worse one the better rather than the worse            the base
                                                   (arXiv 2305.18290)
    orpo        the same                           the better, and rather than the worse
                                                   (arXiv 2403.07691)
    kto         a prompt, an answer, good or not   good ones rather than bad (arXiv 2402.01306) the base
    grpo        a prompt                           what rewards say of the model's own answers the base, where beta > 0
                                                   (arXiv 2402.03300)
    reward      a prompt, a better and a worse one a score for answers, on a head that is saved with the slices

The reference is the model itself with its adapter disabled, so it takes no memory; in place, that writes the base's own values.

To add an objective, enter a row in `OBJECTIVES` and write its trainer (`finetune/trainers.py`). `--objective` and its help, the
data that is asked for, options that other objectives refuse, the learning rate, held-out examples and cards read it from there.

The command line's help reads this file, so what is slow to import is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import Field

from s2ft.finetune.values import Names, Options, Positive, PositiveFloat

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from s2ft.data.examples import Kind
    from s2ft.data.tokens import Tokens
    from s2ft.finetune.options import TrainOptions
    from s2ft.finetune.trainer import RunTrainer


class ObjectiveOptions(Options):
    """Options of objectives beside supervised fine-tuning."""

    beta: float | None = Field(
        None,
        ge=0,
        description="How much dpo, kto and grpo hold on to the base, or how much orpo's odds ratio counts; 0.1 unless given, "
        "for grpo 0: no base",
    )
    reward_function: Names | None = Field(
        None,
        description="What grpo rewards: FILE.py:function, which gets prompts, completions and the fields of the data, and "
        "returns a number for each completion; repeat to add several up",
    )
    generations: Positive = Field(8, description="Answers that grpo samples to each prompt")
    completion_length: Positive = Field(256, description="Tokens of an answer that grpo samples, at most")
    temperature: PositiveFloat = Field(1.0, description="Of the answers that grpo samples")


@dataclass(frozen=True)
class Objective:
    """An objective; what stands here is what most are."""

    title: str  # in logs and cards
    kind: str  # of records, of `KINDS` in `data/preferences.py`
    tokens: str  # what makes tokens of them: module:function
    trainer: str  # module:class
    options: frozenset[str] = frozenset()  # those that not every objective takes
    rate: float = 1.0  # share of the learning rate's rule
    task_type: str = "CAUSAL_LM"  # PEFT's
    needs_base: bool = False  # the base is its reference
    answers: bool = True  # the result answers prompts
    foreseeable: bool = True  # a batch of the data, tried before the run, tells what each step takes
    learnable: bool = True  # strategies can score channels on its data
    held_out: bool = True  # its loss on other data tells how good the weights are
    fewest_rows: int = 1  # of a batch
    grouped: str | None = None  # the option that says how many rows of a batch an example becomes
    measures: tuple[str, ...] = ()  # TRL's, beside the loss, for the run card

    def rows(self, options: TrainOptions) -> int:
        """Rows of a batch that belong together, as an example becomes so many."""
        return 1 if self.grouped is None else int(getattr(options, self.grouped))

    def read(self) -> Kind:
        """The kind of its records."""
        from s2ft.data.preferences import KINDS

        return KINDS[self.kind]

    def tokenize(self, examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
        """What its trainer reads, of the examples."""
        tokens: Tokens = _found(self.tokens)(examples, tokenizer, max_length)
        return tokens

    def trainer_class(self) -> type[RunTrainer]:
        """Its trainer."""
        found: type[RunTrainer] = _found(self.trainer)
        return found


def _found(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


TWENTIETH = 1 / 20  # TRL's default rate of preference and reward objectives, over its default for sft
_TOKENS, _TRAINERS = "s2ft.data.preference_tokens", "s2ft.finetune.trainers"

OBJECTIVES: dict[str, Objective] = {
    "sft": Objective(
        title="supervised fine-tuning",
        kind="answer",
        tokens="s2ft.data.tokens:tokenize",
        trainer="s2ft.finetune.trainer:Trainer",
        options=frozenset({"packing", "samples"}),
    ),
    "dpo": Objective(
        title="direct preference optimization",
        kind="pair",
        tokens=f"{_TOKENS}:tokenize_pairs",
        trainer=f"{_TRAINERS}:Dpo",
        options=frozenset({"beta"}),
        rate=TWENTIETH,
        needs_base=True,
        measures=("rewards/accuracies", "rewards/margins"),
    ),
    "kto": Objective(
        title="answers that were judged, by prospect theory",
        kind="judged",
        tokens=f"{_TOKENS}:tokenize_judged",
        trainer=f"{_TRAINERS}:Kto",
        options=frozenset({"beta"}),
        rate=TWENTIETH,
        needs_base=True,
        fewest_rows=2,
        measures=("rewards/chosen", "rewards/rejected", "kl"),
    ),
    "orpo": Objective(
        title="preferences by the odds ratio, without a reference",
        kind="pair",
        tokens=f"{_TOKENS}:tokenize_pairs",
        trainer="s2ft.finetune.orpo:Orpo",
        options=frozenset({"beta"}),
        rate=TWENTIETH,
        measures=("rewards/accuracies", "log_odds_chosen"),
    ),
    "grpo": Objective(
        title="rewards of the model's own answers",
        kind="prompt",
        tokens=f"{_TOKENS}:tokenize_prompts",
        trainer=f"{_TRAINERS}:Grpo",
        options=frozenset({"beta", "reward_function", "generations", "completion_length", "temperature"}),
        rate=TWENTIETH,
        needs_base=True,
        grouped="generations",
        foreseeable=False,
        learnable=False,
        held_out=False,
        measures=("reward", "reward_std", "completions/mean_length"),
    ),
    "reward": Objective(
        title="a score for answers",
        kind="pair",
        tokens=f"{_TOKENS}:tokenize_whole_pairs",
        trainer=f"{_TRAINERS}:Reward",
        task_type="SEQ_CLS",
        answers=False,
        learnable=False,
        measures=("accuracy", "margin"),
    ),
}


def foreign_to_objective(objective: str) -> set[str]:
    """The options that other objectives take and this one does not.

    Example:
        >>> "beta" in foreign_to_objective("sft"), "packing" in foreign_to_objective("dpo")
        (True, True)
    """
    return set().union(*(other.options for other in OBJECTIVES.values())) - OBJECTIVES[objective].options


def objective_problems(values: Mapping[str, Any], leaves_model: bool) -> Iterator[str]:
    """What an objective does not go with, of options that could be read.

    Args:
        values: The options, with their defaults.
        leaves_model: The method trains the model's own weights.
    """
    name, objective = values["objective"], OBJECTIVES[values["objective"]]
    given = f"objective={name!r}"
    if objective.needs_base and leaves_model:
        yield (
            f"method={values['method']!r} trains the base itself, which {given} needs as its reference; take a method that "
            "trains an adapter"
        )
    if name == "grpo" and not values["reward_function"]:
        yield f"reward_function is missing: {ObjectiveOptions.model_fields['reward_function'].description}"
    if not objective.held_out and values["holdout"] is not None:
        yield f"holdout={values['holdout']!r}: the loss of {given} does not tell how good its answers are; leave it out"
    if not objective.held_out and values["learning_rate"] == "auto":
        yield f"learning_rate='auto': the loss of {given} does not tell how good its answers are; give a rate"
    if not objective.answers and values["evaluate"] is not None:
        yield f"evaluate={values['evaluate']!r}: the result of {given} scores answers and gives none; leave it out"
    size, fewest = values["batch_size"], objective.fewest_rows
    if size is not None and size < fewest:
        yield f"batch_size={size}: {given} compares the examples of a batch with each other; give {fewest} or more"
