"""Fine-tuning in one call: options → checked data and model → method → TRL's SFTTrainer → adapter (or model) and run card.

Everything is checked before anything is written: the first file appears with the first checkpoint or with the adapter.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig

from s2ft.common.errors import gathered, raise_together
from s2ft.common.files import sole_writer
from s2ft.common.locks import no_empty_folders
from s2ft.common.outputs import check_place
from s2ft.data.examples import data_digest, load_examples, prompt_format
from s2ft.data.packing import check_packing
from s2ft.data.template import turn_end
from s2ft.data.tokens import Tokens, hold_out, tokenize
from s2ft.evaluate.comparison import Checked, Scorer, check_scores
from s2ft.finetune.arguments import longest, sft_config, total_steps, warmup_steps
from s2ft.finetune.card import Card, final_loss, write_card
from s2ft.finetune.channels import Examples
from s2ft.finetune.inputs import input_problems
from s2ft.finetune.launch import check_processes
from s2ft.finetune.layout import INDEXED, choose_layout, layout
from s2ft.finetune.lora import check_head
from s2ft.finetune.methods import METHODS
from s2ft.finetune.options import AT_ONCE, LONGEST, TrainOptions
from s2ft.finetune.recipe import mean_channels, settle_batch, settle_rate, too_short
from s2ft.finetune.results import parameters, save_result, section
from s2ft.finetune.resume import as_before, check_output, check_same_run, note_run, noted_layout
from s2ft.finetune.trainer import Flow, Progress, Trainer
from s2ft.format.config import S2FTConfig
from s2ft.format.terms import PURE
from s2ft.runtime.environment import environment, peak_memory
from s2ft.runtime.failures import clear_failures
from s2ft.runtime.models import load_model, load_tokenizer
from s2ft.runtime.precision import choose_precision
from s2ft.runtime.processes import as_leader, leads, process_count

log = logging.getLogger("s2ft")


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: the folder, its card, and the model as it stands."""

    output: Path
    interrupted: bool
    card: Card
    model: torch.nn.Module  # a PeftModel, or the base model itself
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Setup:
    """A run that is ready to start; nothing is written yet."""

    options: TrainOptions
    checkpoint: Path | None
    digest: str
    words: str  # of the prompts, as `prompt_format` names them
    tokens: Tokens
    held_out: Dataset | None
    precision: str  # and the reason for it
    reasons: dict[str, str]  # for the batch and the rate
    config: PeftConfig | None  # resolved; None if the model's own weights are trained
    channels: float | None  # of a slice, on average
    layout: str | None  # the reason for it; None where nothing is sliced
    trainer: Trainer
    flow: Flow
    checked: Checked | None  # questions for the run card


def train(options: TrainOptions) -> TrainResult:
    """Trains an adapter (or, by some methods, the model itself) and writes it to `options.output`, with its run card.

    The selection's seed comes from the data's digest unless given: the same data chooses the same channels again, and two
    tasks do not choose the same ones by default.

    Raises:
        S2FTError: for anything wrong with options, data, model or output folder, before anything is written; for a lack of
            memory or disk, with what to lower.
    """
    output = Path(options.output)
    _check(options)
    alone = sole_writer(output) if leads() else nullcontext()
    with no_empty_folders(output), alone:  # the trainer makes the folder at once
        with clear_failures(_advice(options), options.output):
            setup = _prepare(options)
        with clear_failures(_advice(setup.options), options.output):
            return _run(setup)


def _advice(options: TrainOptions) -> str:
    """What to lower where the memory does not suffice."""
    size, length = options.batch_size or AT_ONCE, options.max_length or LONGEST
    return f"lower batch_size={size} or max_length={length}, or set gradient_checkpointing"


def _check(options: TrainOptions) -> None:
    """What can be said without loading anything, all at once."""
    problems = gathered(
        METHODS[options.method].check, partial(check_processes, options), partial(check_place, options.output)
    )
    problems += input_problems(options.model_dump())
    if problems:
        problems += gathered(partial(check_output, options))  # asked in any case, once no other run writes there
    raise_together(problems)


def _prepare(options: TrainOptions) -> _Setup:
    method = METHODS[options.method]
    checkpoint = check_output(options)
    examples = load_examples(options.data, options.limit)
    digest = data_digest(examples)
    if checkpoint is not None:
        check_same_run(checkpoint, options, digest)
        options = as_before(checkpoint, options)
    words = prompt_format(examples)
    asked = "chat" if words == "chat" else "alpaca"  # who trained on prompts of their own has none for our questions
    checked = (
        check_scores(options.evaluate, str(options.eval_data), options.eval_limit, asked) if options.evaluate else None
    )
    tokenizer = load_tokenizer(options.model)
    dtype, autocast, reason = method.precision(*choose_precision(options.precision))
    log.info("precision: %s", reason)
    model = load_model(options.model, dtype)
    max_length = longest(options, model)
    tokens = tokenize(examples, tokenizer, max_length)
    _tell_dropped(tokens, len(examples))
    if words == "chat":
        _tell_end(tokenizer)
        _tell_parted(tokens)
    tokens, held_out = hold_out(tokens, options.holdout, options.train_seed)
    rows = _rows(tokens, max_length if options.packing else None)
    batch = settle_batch(options, rows)
    args = sft_config(batch.options, max_length, autocast, **method.arguments(options, model))
    model.to(args.device)
    if options.packing:
        check_packing(model)
    if checkpoint is None or method.leaves_model:
        config = as_leader(method.peft_config(batch.options, model, Examples(tokens.dataset, digest, tokenizer)))
    else:
        config = _adapter_of(checkpoint)
    channels = mean_channels(config)
    rate = settle_rate(batch.options, rows, channels)
    options, args.learning_rate = rate.options, rate.options.learning_rate
    reasons = {"batch": batch.reason, "learning_rate": rate.reason}
    if checkpoint is None:
        log.info("batch: %s", batch.reason)
        log.info("learning rate: %g, %s", options.learning_rate, rate.reason)
    flow = Flow(options.save_every)
    if config is not None:
        check_head(config, model)
    callbacks = [flow, *method.callbacks(options, model)]
    trainer = _build_trainer(args, model, (tokens.dataset, held_out), tokenizer, config, callbacks)
    trainer.pure_bf16 = options.precision == PURE
    taken, why = _choose_layout(options, checkpoint, trainer) if isinstance(config, S2FTConfig) else (INDEXED, None)
    settled = options.model_copy(update={"layout": taken})  # whoever runs or resumes it again takes the same
    trainer.annotate = lambda folder: note_run(folder, settled, digest, words)
    return _Setup(
        settled,
        checkpoint,
        digest,
        words,
        tokens,
        held_out,
        reason,
        reasons,
        config,
        channels,
        why,
        trainer,
        flow,
        checked,
    )


def _rows(tokens: Tokens, packed_to: int | None) -> int:
    """What the loader will draw from: the examples, or about so many packed rows."""
    if packed_to is None:
        return len(tokens.dataset)
    return math.ceil(sum(map(len, tokens.dataset["input_ids"])) / packed_to)


def _choose_layout(options: TrainOptions, checkpoint: Path | None, trainer: Trainer) -> tuple[str, str]:
    noted = None if checkpoint is None else noted_layout(checkpoint)
    if noted is not None:
        return noted, f"{noted}, as the checkpoint's run"
    with torch.random.fork_rng(devices=[]):  # looking at a batch must not move the order of the run's
        batch = next(iter(trainer.get_train_dataloader()))
    chosen = as_leader(choose_layout(trainer.model, batch, options.layout))  # measured: each might choose another
    log.info("layout: %s", chosen[1])
    return chosen


def _build_trainer(
    args: SFTConfig,
    model: PreTrainedModel,
    data: tuple[Dataset, Dataset | None],  # to train on, held out
    tokenizer: PreTrainedTokenizerBase,
    config: PeftConfig | None,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    set_seed(args.seed)  # an adapter may start from random values
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=tokenizer,
        peft_config=config,
        callbacks=list(callbacks),
    )
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(Progress())
    return trainer


def _run(setup: _Setup) -> TrainResult:
    options, trainer = setup.options, setup.trainer
    steps = total_steps(options, len(trainer.get_train_dataloader()))
    trainer.args.warmup_steps = warmup_steps(options, steps)
    trainer.args.eval_delay = steps / 2  # early weights are not the best
    log.info("training by %s: %d examples, %d steps", _method_in_words(setup), len(setup.tokens.dataset), steps)
    if (short := too_short(options, steps, setup.channels)) is not None:
        log.warning("%s", short)
    scorer = Scorer(trainer.processing_class, setup.checked, Path(options.output) / "answers")
    if METHODS[options.method].leaves_model:
        scorer.score_base(trainer.model)  # its weights will be gone
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with setup.flow.listening():
        with METHODS[options.method].resuming(), layout(trainer.model, options.layout):
            metrics = trainer.train(
                resume_from_checkpoint=None if setup.checkpoint is None else str(setup.checkpoint)
            ).metrics
        # From here on, Ctrl-C must not keep the result from being saved; while the best weights were loaded, it came too late
        interrupted = setup.flow.interrupted and trainer.state.global_step < trainer.state.max_steps
        card = {"status": "interrupted" if interrupted else "finished", **_card(setup, steps, metrics)}
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        if leads():
            save_result(options, model, trainer.processing_class, card)
        trainer.accelerator.wait_for_everyone()  # who leaves first takes an empty output folder along
    if setup.checked is not None and not interrupted:
        card["scores"] = scorer.compare(model)
        write_card(Path(options.output), card)
    return TrainResult(Path(options.output), interrupted, card, model, trainer.processing_class)


def _method_in_words(setup: _Setup) -> str:
    title, config = METHODS[setup.options.method].title, setup.config
    if not isinstance(config, S2FTConfig):
        return title
    if config.strategy == "random":
        return f"{title}, channels drawn by seed {config.seed}"
    return f"{title}, channels of the {config.subset} {config.strategy} scores"


def _card(setup: _Setup, steps: int, metrics: dict[str, float]) -> Card:
    trainer, tokens = setup.trainer, setup.tokens
    history = trainer.state.log_history
    curve = _points(history, "loss")
    trainable, total = parameters(trainer.model)
    seconds = metrics["train_runtime"]
    first = 0 if setup.checkpoint is None else int(setup.checkpoint.name.partition("-")[2])
    seen = max((entry.get("num_tokens", 0) for entry in history if entry["step"] > first), default=0)
    return {
        "options": setup.options.model_dump(mode="json"),
        "environment": environment(),
        "data": {
            "digest": setup.digest,
            "format": setup.words,
            "examples": len(tokens.dataset),
            "without_response": tokens.empty,
            "response_beyond_max_length": tokens.too_long,
            "shortened": tokens.shortened,
            "without_end": tokens.endless,
        },
        **_selection(setup.config),
        section(setup.options): {
            "trainable_parameters": trainable,
            "model_parameters": total,
            "share": trainable / total,
        },
        "training": {
            "method": setup.options.method,
            "learning_rate": setup.options.learning_rate,
            "learning_rate_reason": setup.reasons["learning_rate"],
            "batch": setup.reasons["batch"],
            "precision": setup.precision,
            **({"processes": process_count()} if process_count() > 1 else {}),
            **({"layout": setup.layout} if setup.layout is not None else {}),
            "max_length": tokens.max_length,
            "warmup_steps": int(trainer.args.warmup_steps),
            "steps": trainer.state.global_step,
            "planned_steps": steps,
            "resumed_from": None if setup.checkpoint is None else setup.checkpoint.name,
            "seconds": round(seconds, 3),
            "tokens": int(seen),
            "tokens_per_second": round(seen / seconds, 1),
            "final_loss": final_loss(curve),
            **_held_out(setup),
            **peak_memory(),
        },
        "loss_curve": curve,
        **({"held_out_curve": _points(history, "eval_loss")} if setup.held_out is not None else {}),
    }


def _points(history: Sequence[dict[str, float]], name: str) -> list[tuple[int, float]]:
    return [(int(entry["step"]), entry[name]) for entry in history if name in entry]


def _held_out(setup: _Setup) -> Card:
    if setup.held_out is None:
        return {}
    state = setup.trainer.state
    return {"held_out": len(setup.held_out), "best_step": state.best_global_step, "best_loss": state.best_metric}


def _selection(config: PeftConfig | None) -> Card:
    if not isinstance(config, S2FTConfig):
        return {}
    chosen = {"seed": config.seed} if config.strategy == "random" else {"subset": config.subset}
    return {"selection": {"strategy": config.strategy, **chosen, "modules": len(config.slices or {})}}


def _adapter_of(checkpoint: Path) -> PeftConfig:
    """The config of a checkpoint's adapter, ready to be trained on."""
    config: PeftConfig = PeftConfig.from_pretrained(str(checkpoint))
    config.inference_mode = False
    return config


def _tell_end(tokenizer: PreTrainedTokenizerBase) -> None:
    end, usual = turn_end(tokenizer), tokenizer.eos_token
    if end is not None and end != tokenizer.eos_token_id:
        name = tokenizer.convert_ids_to_tokens(end)
        log.info("answers end with %s, as the chat template writes it, not with the tokenizer's %s", name, usual)


def _tell_parted(tokens: Tokens) -> None:
    if tokens.parted:
        text = (
            "%d of %d prompts are laid out differently by the chat template once the answer follows, so the model is trained "
            "in another context than it is asked in (as where a template opens the answer with <think>)"
        )
        log.warning(text, tokens.parted, len(tokens.dataset))


def _tell_dropped(tokens: Tokens, count: int) -> None:
    if tokens.empty:
        log.warning("%d of %d examples have no response and are left out", tokens.empty, count)
    if tokens.too_long:
        log.warning("%d of %d examples have their response beyond max_length and are left out", tokens.too_long, count)
    if tokens.endless:
        text = "%d of %d responses hold no token that ends an answer, so the model will not learn to stop there: %s"
        reason = "the model's chat template ends no turn of the assistant by a token of its own"
        log.warning(text, tokens.endless, count, reason)
