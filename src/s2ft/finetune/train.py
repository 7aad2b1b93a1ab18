"""Fine-tuning in one call: options → checked data and model → method → TRL's SFTTrainer → adapter (or model) and run card.

Everything is checked before anything is written: the first file appears with the first checkpoint or with the adapter.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from s2ft.common.files import sole_writer
from s2ft.common.locks import no_empty_folders
from s2ft.evaluate.comparison import Scorer
from s2ft.finetune.arguments import total_steps, warmup_steps
from s2ft.finetune.card import Card
from s2ft.finetune.checkpoints import remove_unfinished, step_of
from s2ft.finetune.engines import trained_state
from s2ft.finetune.estimate import Estimate, estimate
from s2ft.finetune.head import small_tiles
from s2ft.finetune.hub import push
from s2ft.finetune.launch import check_run
from s2ft.finetune.layout import layout
from s2ft.finetune.methods import find_method
from s2ft.finetune.options import AT_ONCE, LONGEST, TrainOptions
from s2ft.finetune.prepare import Setup, prepare
from s2ft.finetune.recipe import mean_channels, too_short
from s2ft.finetune.results import run_card, save_result, write_run
from s2ft.finetune.resume import FINISHED, TRAINED
from s2ft.finetune.samples import Samples
from s2ft.finetune.trackers import tracking
from s2ft.format.config import S2FTConfig
from s2ft.format.terms import DRAWN
from s2ft.runtime.failures import clear_failures
from s2ft.runtime.processes import is_managed, leads
from s2ft.tuner.unloading import changes_base

log = logging.getLogger("s2ft")


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: the folder, its card, and the model as it stands."""

    output: Path
    interrupted: bool
    card: Card
    model: torch.nn.Module  # a PeftModel, or the base model itself
    tokenizer: PreTrainedTokenizerBase

    def whole(self) -> TrainResult:
        """Itself, for callers that go on to measure it.

        Raises:
            KeyboardInterrupt: if the run was interrupted: what it had come to is not what it would have taught.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        return self


def train(options: TrainOptions) -> TrainResult:
    """Trains an adapter (or, by some methods, the model itself) and writes it to `options.output`, with its run card.

    The selection's seed comes from the data's digest unless given: the same data chooses the same channels again, and two
    tasks do not choose the same ones by default.

    Raises:
        S2FTError: for anything wrong with options, data, model or output folder, before anything is written; for a lack of
            memory or disk, with what to lower.
    """
    output = Path(options.output)
    check_run(options)
    alone = sole_writer(output) if leads() else nullcontext()
    with no_empty_folders(output), alone, small_tiles():  # the trainer makes the folder at once
        if leads():
            remove_unfinished(output)
        with clear_failures(_advice(options), options.output):
            setup = prepare(options)
        with clear_failures(_advice(setup.options), options.output):
            return _run(setup)


def _advice(options: TrainOptions) -> str:
    """What to do when memory runs out."""
    size, length = options.batch_size or AT_ONCE, options.max_length or LONGEST
    return f"lower batch_size={size} or max_length={length}, or set gradient_checkpointing"


def _run(setup: Setup) -> TrainResult:
    options, trainer, output = setup.options, setup.trainer, Path(setup.options.output)
    steps = _plan(setup)
    foreseen = _estimate(setup, steps)
    scorer = Scorer(setup.data.tokenizer, setup.questions, output / "answers")
    samples = Samples(setup.data.asked, setup.data.tokenizer, options.samples if leads() else 0)
    if setup.config is None or changes_base(setup.config):  # the base's weights will be gone
        scorer.score_base(trainer.model)
        samples.ask_base(trainer.model)
    with setup.flow.listening():
        metrics = _train(setup)
        # Ctrl-C must not prevent saving from here on; one that came while the best weights were loaded counts as too late
        interrupted = setup.flow.interrupted and trainer.state.global_step < trainer.state.max_steps
        asks = (setup.questions is not None or options.samples > 0) and not interrupted
        status = "interrupted" if interrupted else TRAINED if asks else FINISHED
        card = {"status": status, **run_card(setup, steps, foreseen, metrics)}
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        state = trained_state(model) if is_managed() else None
        if leads():
            save_result(options, model, setup.data.tokenizer, card, state)
        trainer.accelerator.wait_for_everyone()  # the first to leave would remove an empty output folder
    if asks and leads():
        card |= {"status": FINISHED, "samples": samples.compare(model)}
        card |= {} if setup.questions is None else {"scores": scorer.compare(model), "answers": scorer.answers()}
        write_run(output, card)
    if options.push_to_hub is not None and not interrupted and leads():
        log.info("uploaded: %s", push(output, options.push_to_hub))
    return TrainResult(output, interrupted, card, model, setup.data.tokenizer)


def _plan(setup: Setup) -> int:
    """The number of steps; what depends on it is told to the trainer, and all of it to the user."""
    options, trainer = setup.options, setup.trainer
    steps = total_steps(options, len(trainer.get_train_dataloader()))
    trainer.args.warmup_steps = warmup_steps(options, steps)
    trainer.args.eval_delay = steps / 2  # early weights are not the best
    examples = len(setup.data.tokens.dataset)
    log.info("training by %s: %d examples, %d steps", _method_in_words(setup), examples, steps)
    base = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else None
    if (short := too_short(options, steps, mean_channels(setup.config, base))) is not None:
        log.warning("%s", short)
    return steps


def _estimate(setup: Setup, steps: int) -> Estimate | None:
    """Told before the run; None where one batch does not tell what it takes."""
    if setup.trial is None:
        return None
    options, trainer = setup.options, setup.trainer
    assert options.batch_size is not None
    assert options.gradient_accumulation is not None
    lengths = trainer.lengths(trainer.train_dataset)
    left = steps - (0 if setup.checkpoint is None else step_of(setup.checkpoint))
    found = estimate(setup.trial, trainer.model, lengths, options.batch_size, options.gradient_accumulation, left)
    log.info("time: %s", found.time)
    log.info("memory: %s", found.memory)
    if found.lack is not None:
        log.warning("%s: %s", found.lack, _advice(options))
    return found


def _train(setup: Setup) -> dict[str, float]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    checkpoint = None if setup.checkpoint is None else str(setup.checkpoint)
    method, watched = find_method(setup.options.method), tracking(setup.options.report_to or [])
    with watched, method.resuming(), layout(setup.trainer.model, setup.options.layout):
        metrics: dict[str, float] = setup.trainer.train(resume_from_checkpoint=checkpoint).metrics
    return metrics


def _method_in_words(setup: Setup) -> str:
    title, config = find_method(setup.options.method).title, setup.config
    if not isinstance(config, S2FTConfig):
        return title
    if config.strategy in DRAWN:
        return f"{title}, channels drawn by seed {config.seed}"
    return f"{title}, channels of the {config.subset} {config.strategy} scores"
