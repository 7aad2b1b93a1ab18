"""From options to a run that is ready to start: data, model, method, trainer. Nothing is written yet.

    options ─→ checkpoint? ─→ data ─→ model ─→ batch ─→ adapter ─→ rate ─→ trainer ─→ layout

What was left open is settled on the way, each with its reason (`Note.reasons`).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from s2ft.data.examples import data_digest, load, prompt_format
from s2ft.data.masks import CLOSED, OPENED, marked, spans
from s2ft.data.packing import check_packing
from s2ft.data.template import turn_end
from s2ft.data.tokens import SOURCE, Tokens, hold_out, weigh, without
from s2ft.evaluate.comparison import Checked, check_scores
from s2ft.finetune.arguments import longest, trainer_config
from s2ft.finetune.card import Card
from s2ft.finetune.channels import Examples
from s2ft.finetune.checkpoints import Checkpoints, step_of
from s2ft.finetune.engines import check_started, computes_in_bf16, loading
from s2ft.finetune.layout import INDEXED, Chosen, choose_layout, untried
from s2ft.finetune.live import LiveView
from s2ft.finetune.lora import check_head
from s2ft.finetune.methods import find_method
from s2ft.finetune.objectives import OBJECTIVES
from s2ft.finetune.options import TrainOptions
from s2ft.finetune.recipe import mean_channels, planned_steps, settle_batch, settle_rate
from s2ft.finetune.resume import Note, Paused, check_output, given
from s2ft.finetune.reward_functions import load_reward, rewards_digest
from s2ft.finetune.search import plan_tries, search
from s2ft.finetune.trackers import NONE
from s2ft.finetune.trainer import Flow, RunTrainer
from s2ft.finetune.trial import Trial
from s2ft.finetune.values import AUTO_RATE
from s2ft.format.config import S2FTConfig
from s2ft.format.terms import PURE
from s2ft.layer.sharding import from_first, is_loaded_once
from s2ft.runtime.models import load_model, load_scorer, load_tokenizer, place, settle_generation
from s2ft.runtime.precision import choose_precision
from s2ft.runtime.processes import as_leader, engine, is_divided
from s2ft.runtime.trainable import check_trainable

log = logging.getLogger("s2ft")

UNSEEN = {"save_strategy": "no", "report_to": NONE}  # arguments of short runs, which leave nothing


@dataclass(frozen=True)
class Data:
    """The training data, read and tokenised."""

    tokens: Tokens  # to train on
    held_out: Dataset | None
    digest: str
    format: str  # of the prompts, from `prompt_format`
    tokenizer: PreTrainedTokenizerBase

    @property
    def examples(self) -> Examples:
        """For methods that look at them first."""
        return Examples(self.tokens.dataset, self.digest, self.tokenizer)

    @property
    def asked(self) -> Dataset:
        """Examples to ask base and result for answers: what was not trained on, if anything was held out."""
        return self.tokens.dataset if self.held_out is None else self.held_out

    def rows(self, packed_to: int | None) -> int:
        """What the loader draws from: the examples, or about so many rows packed to this length."""
        if packed_to is None:
            return len(self.tokens.dataset)
        return math.ceil(sum(map(len, self.tokens.dataset["input_ids"])) / packed_to)


@dataclass(frozen=True)
class Setup:
    """A run that is ready to start."""

    note: Note  # what the run is
    checkpoint: Path | None
    data: Data
    config: PeftConfig | None  # resolved; None if the model's own weights are trained
    trainer: RunTrainer
    flow: Flow
    trial: Trial | None  # of one batch; None where that would not tell what the run takes
    questions: Checked | None  # for the run card

    @property
    def options(self) -> TrainOptions:
        """With nothing left open."""
        return self.note.options


def prepare(options: TrainOptions) -> Setup:
    """Loads, checks and settles everything.

    Raises:
        S2FTError: for anything wrong with data, model or checkpoint.
    """
    method, objective, paused = find_method(options.method), OBJECTIVES[options.objective], check_output(options)
    rewards = rewards_digest(options.reward_function)  # now: the file may be edited while the run goes on
    examples = read_examples(options)
    digest = data_digest(examples)
    asked = given(options) if paused is None else paused.given
    if paused is not None:
        paused.check_same_run(options, digest)
        options = paused.settle(options)
    questions = _questions(options, prompt_format(examples))

    tokenizer, reasons = load_tokenizer(options.model), {}
    dtype, autocast, reasons["precision"] = method.precision(*choose_precision(options.precision))
    log.info("precision: %s", reasons["precision"])
    with loading():
        model = (load_model if objective.answers else load_scorer)(options.model, dtype, options.quantize)
    if method.leaves_model:
        settle_generation(model)
    autocast |= computes_in_bf16(dtype)
    max_length = longest(options, model)
    data = _tokenized(options, examples, digest, tokenizer, max_length)
    rows = data.rows(max_length if options.packing else None) * objective.rows(options)

    options, reasons["batch"] = settle_batch(options, rows)
    arguments = partial(trainer_config, max_length=max_length, autocast=autocast, **method.arguments(options, model))
    device = arguments(options).device
    if not is_divided():
        place(model, device)
        check_trainable(model)
    if options.packing:
        check_packing(model)
    config = _adapter(options, paused, model, data)
    make = partial(_trainer, model, arguments)
    if paused is None:
        log.info("batch: %s", reasons["batch"])
    options, reasons["learning_rate"], found = _settle_rate(
        options, paused, data, mean_channels(config, model), config, rows, make
    )
    if paused is None:
        log.info("learning rate: %g, %s", options.learning_rate, reasons["learning_rate"])
    else:
        reasons |= paused.reasons  # by now these are options like any given

    flow = Flow(options.save_every, saves_end=questions is not None or options.samples > 0)
    callbacks = [flow, *method.callbacks(options, model)]
    trainer = make(options, data, config, callbacks)
    check_started(trainer)
    chosen = _settle_layout(options, paused, trainer, sliced=isinstance(config, S2FTConfig))
    options = options.model_copy(update={"layout": chosen.layout})  # whoever runs them again takes the same
    reasons |= {"layout": chosen.reason} if isinstance(config, S2FTConfig) else {}
    note = Note(options, digest, data.format, reasons, asked, rewards, found)
    if paused is not None:
        note = replace(note, seconds=paused.seconds, parts=(*paused.parts, step_of(paused.checkpoint)))
    trainer.add_callback(Checkpoints(note.write))
    checkpoint = None if paused is None else paused.checkpoint
    return Setup(note, checkpoint, data, config, trainer, flow, chosen.trial, questions)


def read_examples(options: TrainOptions) -> Dataset:
    """The examples, where they are to be weighed with their sources; says what was taken for what."""
    loaded = load(options.data, options.limit, OBJECTIVES[options.objective].read(), options.map)
    for reading in loaded.readings:
        for line in reading.lines():
            log.info("data: %s", line)
    if options.data_weights is None:
        return loaded.examples
    return loaded.examples.add_column(SOURCE, loaded.sources)


def _questions(options: TrainOptions, prompts: str) -> Checked | None:
    """What base and result are asked; who trained on prompts of their own has none for our questions."""
    if options.evaluate is None:
        return None
    asked = "chat" if prompts == "chat" else "alpaca"
    return check_scores(options.evaluate, str(options.eval_data), options.eval_limit, asked)


def _tokenized(
    options: TrainOptions, examples: Dataset, digest: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Data:
    objective = OBJECTIVES[options.objective]
    tokens, prompts = objective.tokenize(examples, tokenizer, max_length), prompt_format(examples)
    _warn_of_dropped(tokens, len(examples) // objective.read().together)
    if objective.kind == "answer":
        shown = marked(spans(tokens.dataset[0], tokenizer))
        log.info("the first example, learned between %s and %s:\n%s", OPENED, CLOSED, shown)
    if prompts == "chat":
        _tell_end(tokenizer)
        _warn_of_parted(tokens)
    left, held_out = hold_out(tokens, options.holdout, options.train_seed)
    if options.data_weights is not None:
        left = weigh(left, options.data_weights, options.train_seed)
        held_out = held_out and held_out.remove_columns(SOURCE)
    return Data(left, held_out, digest, prompts, tokenizer)


def _adapter(options: TrainOptions, paused: Paused | None, model: PreTrainedModel, data: Data) -> PeftConfig | None:
    """The config of the method's adapter, or of the checkpoint's; None if the model's own weights are trained."""
    method = find_method(options.method)
    if paused is None or method.leaves_model:
        choose = partial(method.peft_config, options, model, data.examples)
        config = from_first(choose) if is_loaded_once() else as_leader(choose())
    else:
        config = PeftConfig.from_pretrained(str(paused.checkpoint))
        config.inference_mode = False
    if config is not None:
        check_head(config, model)
    return config


def _settle_rate(
    options: TrainOptions,
    paused: Paused | None,
    data: Data,
    channels: float | None,
    config: PeftConfig | None,
    rows: int,
    make: Callable[..., RunTrainer],
) -> tuple[TrainOptions, str, Card | None]:
    """The options with a learning rate, the reason, and how short runs found it, now or before the pause."""
    settled, reason = settle_rate(options, rows, channels)
    if options.learning_rate != AUTO_RATE:
        noted = None if paused is None else paused.search
        return settled, reason if noted is None else str(noted.get("reason")), noted
    short = plan_tries(settled, len(data.tokens.dataset), planned_steps(settled, rows))
    left, apart = hold_out(data.tokens, short.held_out, options.train_seed)
    if options.data_weights is not None and apart is not None:
        left = without(left, apart)  # else other copies of them would be trained on
    parts = replace(data, tokens=left, held_out=apart)
    found = search(settled, short, lambda brief: make(brief, parts, copy.deepcopy(config), [], **UNSEEN))
    return settled.model_copy(update={"learning_rate": found.rate}), found.reason, found.card


def _trainer(
    model: PreTrainedModel,
    arguments: Callable[..., TrainingArguments],
    options: TrainOptions,
    data: Data,
    config: PeftConfig | None,
    callbacks: Sequence[TrainerCallback],
    **more: Any,  # arguments
) -> RunTrainer:
    args = arguments(options, **more)
    set_seed(args.seed)  # an adapter may start from random values
    rewards = {"reward_funcs": [*map(load_reward, options.reward_function)]} if options.reward_function else {}
    with find_method(options.method).building():
        trainer = OBJECTIVES[options.objective].trainer_class()(
            model=model,
            args=args,
            train_dataset=data.tokens.dataset,
            eval_dataset=data.held_out,
            processing_class=data.tokenizer,
            peft_config=config,
            callbacks=list(callbacks),
            pure_bf16=options.precision == PURE,
            **rewards,
        )
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(LiveView())
    return trainer


def _settle_layout(options: TrainOptions, paused: Paused | None, trainer: RunTrainer, sliced: bool) -> Chosen:
    """The layout that is taken, and what one batch took in it."""
    if not find_method(options.method).foreseeable:
        return Chosen(INDEXED, "nothing is sliced", None)
    if is_divided():
        return Chosen(INDEXED, f"indexed: {engine()} leaves each process a part of the weights", None)
    noted = None if paused is None else paused.layout
    if not OBJECTIVES[options.objective].foreseeable:
        return untried(trainer.model, noted or options.layout if sliced else INDEXED)
    with torch.random.fork_rng(devices=[]):  # looking at a batch must not move the order of the run's
        batch = next(iter(trainer.get_train_dataloader()))
    wanted = noted or options.layout if sliced else INDEXED
    chosen = choose_layout(trainer.loss_of, trainer.model, batch, wanted)
    chosen = as_leader(chosen)  # each process might choose another
    if noted is not None:
        return Chosen(chosen.layout, f"{noted}, as the checkpoint's run", chosen.trial)
    if sliced:
        log.info("layout: %s", chosen.reason)
    return chosen


def _tell_end(tokenizer: PreTrainedTokenizerBase) -> None:
    end, usual = turn_end(tokenizer), tokenizer.eos_token
    if end is not None and end != tokenizer.eos_token_id:
        name = tokenizer.convert_ids_to_tokens(end)
        log.info("answers end with %s, as the chat template writes it, not with the tokenizer's %s", name, usual)


def _warn_of_parted(tokens: Tokens) -> None:
    if tokens.parted:
        text = (
            "%d of %d prompts are laid out differently by the chat template once the answer follows, so the model is trained "
            "in another context than it is asked in (as where a template opens the answer with <think>)"
        )
        log.warning(text, tokens.parted, len(tokens.dataset))


def _warn_of_dropped(tokens: Tokens, count: int) -> None:
    if tokens.empty:
        log.warning("%d of %d examples have no response and are left out", tokens.empty, count)
    if tokens.too_long:
        log.warning("%d of %d examples have their response beyond max_length and are left out", tokens.too_long, count)
    if tokens.alike:
        log.warning("%d of %d pairs have the same answer twice and are left out", tokens.alike, count)
    if tokens.endless:
        text = "%d of %d responses hold no token that ends an answer, so the model will not learn to stop there: %s"
        reason = "the model's chat template ends no turn of the assistant by a token of its own"
        log.warning(text, tokens.endless, count, reason)
