"""Fine-tuning in one call: options → checked data and model → selection → TRL's SFTTrainer → adapter and run card.

Everything is checked before anything is written: the first file appears with the first checkpoint or with the adapter.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from trl import SFTConfig

from s2ft.files import no_empty_folders, staged
from s2ft.method.config import S2FTConfig
from s2ft.work.card import Card, final_loss, write_card
from s2ft.work.channels import channels_of, choose_channels
from s2ft.work.data import data_digest, load_examples
from s2ft.work.environment import environment
from s2ft.work.failures import clear_failures
from s2ft.work.model_card import model_card
from s2ft.work.models import load_model, load_tokenizer
from s2ft.work.options import LONGEST, TrainOptions, to_yaml
from s2ft.work.packing import check_packing
from s2ft.work.precision import choose_precision
from s2ft.work.recipe import longest, sft_config, total_steps, warmup_steps
from s2ft.work.resume import check_output, check_same_run, note_run
from s2ft.work.tokens import Tokens, tokenize
from s2ft.work.trainer import Flow, Progress, Trainer

log = logging.getLogger("s2ft")


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: the folder, its card, and the model as it stands."""

    output: Path
    interrupted: bool
    card: Card
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Setup:
    """A run that is ready to start; nothing is written yet."""

    options: TrainOptions
    checkpoint: Path | None
    digest: str
    tokens: Tokens
    precision: str  # the reason for the base's dtype
    config: S2FTConfig  # resolved
    trainer: Trainer
    flow: Flow


def train(options: TrainOptions) -> TrainResult:
    """Trains an adapter and writes it to `options.output`, with its run card.

    The selection's seed comes from the data's digest unless given: the same data chooses the same channels again, and two
    tasks do not choose the same ones by default.

    Raises:
        S2FTError: for anything wrong with options, data, model or output folder, before anything is written; for a lack of
            memory or disk, with what to lower.
    """
    length = options.max_length or LONGEST
    advice = f"lower batch_size={options.batch_size} or max_length={length}, or set gradient_checkpointing"
    with clear_failures(advice, options.output), no_empty_folders(Path(options.output)):  # the trainer makes it at once
        return _run(_prepare(options))


def _prepare(options: TrainOptions) -> _Setup:
    checkpoint = check_output(options)
    examples = load_examples(options.data, options.limit)
    digest = data_digest(examples)
    if checkpoint is not None:
        check_same_run(checkpoint, options, digest)
    tokenizer = load_tokenizer(options.model)
    dtype, reason = choose_precision(options.precision)
    log.info("precision: %s", reason)
    model = load_model(options.model, dtype)
    max_length = longest(options, model)
    tokens = tokenize(examples, tokenizer, max_length)
    _tell_dropped(tokens, len(examples))
    args = sft_config(options, max_length)
    model.to(args.device)
    if options.packing:
        check_packing(model)
    if checkpoint is None:
        config = choose_channels(options, digest, model, tokens.dataset, tokenizer)
    else:
        config = channels_of(checkpoint)
    flow = Flow()
    trainer = _build_trainer(args, model, tokens, tokenizer, config, flow)
    trainer.annotate = lambda folder: note_run(folder, options, digest)
    return _Setup(options, checkpoint, digest, tokens, reason, config, trainer, flow)


def _build_trainer(
    args: SFTConfig,
    model: PreTrainedModel,
    tokens: Tokens,
    tokenizer: PreTrainedTokenizerBase,
    config: S2FTConfig,
    flow: Flow,
) -> Trainer:
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokens.dataset,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[flow],
    )
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(Progress())
    return trainer


def _run(setup: _Setup) -> TrainResult:
    options, trainer = setup.options, setup.trainer
    steps = total_steps(options, len(trainer.get_train_dataloader()))
    trainer.args.warmup_steps = warmup_steps(options, steps)
    log.info("training: %d examples, %d steps, selection seed %s", len(setup.tokens.dataset), steps, setup.config.seed)
    with setup.flow.listening():
        metrics = trainer.train(
            resume_from_checkpoint=None if setup.checkpoint is None else str(setup.checkpoint)
        ).metrics
        interrupted = setup.flow.interrupted  # from here on, Ctrl-C must not keep the adapter from being saved
        card = {"status": "interrupted" if interrupted else "finished", **_card(setup, steps, metrics)}
        _save(setup, card)
    return TrainResult(Path(options.output), interrupted, card, trainer.model, trainer.processing_class)


def _save(setup: _Setup, card: Card) -> None:
    """The adapter, its README and the options, then the card."""
    options, model = setup.options, setup.trainer.model
    output = Path(options.output)
    with staged(output) as aside:
        model.save_pretrained(str(aside))
        (aside / "README.md").write_text(model_card(options.model, *_parameters(model)), encoding="utf-8")
        (aside / "run.yaml").write_text(f"# {command(options)}\n{to_yaml(options)}", encoding="utf-8")
        card["adapter"]["bytes"] = (aside / "adapter_model.safetensors").stat().st_size
    write_card(output, card)


def command(options: TrainOptions, resume: bool = False) -> str:
    """The command line that runs these options again, from the file beside the adapter."""
    words = ["s2ft", "train", "--config", str(Path(options.output) / "run.yaml"), *(["--resume"] if resume else [])]
    return shlex.join(words)


def _card(setup: _Setup, steps: int, metrics: dict[str, float]) -> Card:
    trainer, tokens = setup.trainer, setup.tokens
    history = trainer.state.log_history
    curve = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    trainable, total = _parameters(trainer.model)
    seconds = metrics["train_runtime"]
    first = 0 if setup.checkpoint is None else int(setup.checkpoint.name.partition("-")[2])
    seen = max((entry.get("num_tokens", 0) for entry in history if entry["step"] > first), default=0)
    return {
        "options": setup.options.model_dump(mode="json"),
        "environment": environment(),
        "data": {
            "digest": setup.digest,
            "examples": len(tokens.dataset),
            "without_response": tokens.empty,
            "response_beyond_max_length": tokens.too_long,
            "shortened": tokens.shortened,
        },
        "selection": {
            "strategy": setup.config.strategy,
            "seed": setup.config.seed,
            "modules": len(setup.config.slices or {}),
        },
        "adapter": {"trainable_parameters": trainable, "model_parameters": total, "share": trainable / total},
        "training": {
            "precision": setup.precision,
            "max_length": tokens.max_length,
            "warmup_steps": int(trainer.args.warmup_steps),
            "steps": trainer.state.global_step,
            "planned_steps": steps,
            "resumed_from": None if setup.checkpoint is None else setup.checkpoint.name,
            "seconds": round(seconds, 3),
            "tokens": int(seen),
            "tokens_per_second": round(seen / seconds, 1),
            "final_loss": final_loss(curve),
        },
        "loss_curve": curve,
    }


def _parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable parameters, and those of the model without them."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in model.parameters()) - trainable


def _tell_dropped(tokens: Tokens, count: int) -> None:
    if tokens.empty:
        log.warning("%d of %d examples have no response and are left out", tokens.empty, count)
    if tokens.too_long:
        log.warning("%d of %d examples have their response beyond max_length and are left out", tokens.too_long, count)
