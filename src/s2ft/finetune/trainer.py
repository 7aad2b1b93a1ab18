"""TRL's SFTTrainer with what a run here needs besides: whole checkpoints, a polite end, and nothing sent anywhere."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints
from trl import SFTTrainer

from s2ft.common.errors import S2FTError
from s2ft.common.files import staged
from s2ft.runtime.processes import anywhere, as_leader
from s2ft.training.rounding import round_steps

Logs = dict[str, Any] | None

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class DivergedError(S2FTError):
    """The loss of a training is no number any more."""


class Trainer(SFTTrainer):
    """SFTTrainer whose checkpoints appear by one rename: a checkpoint folder that is there is whole."""

    pure_bf16 = False
    annotate: Callable[[Path], None] | None = None  # adds files of ours to a checkpoint
    _aside: Path | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the line of the bar is ended, whatever ends the training, so that a message has its own."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Progress):
                    callback.close()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with `pure_bf16`, over bf16 deltas, in steps that are rounded stochastically."""
        self._purify()
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.pure_bf16:
            round_steps(optimizer)
        return optimizer

    def _purify(self) -> None:
        """With `pure_bf16`, bf16 deltas: PEFT brings what it loads from a checkpoint to fp32."""
        for parameter in self.model.parameters() if self.pure_bf16 else ():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; training goes on with the random numbers that it would have had without."""
        with torch.random.fork_rng(devices=[]):  # a loader draws from the CPU's; in evaluation nothing else is drawn
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        trained: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        self._place_best()  # a folder may have moved since its checkpoints were written
        return trained

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which would take a step more after a run that was killed at its last checkpoint."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        """An interrupted run leaves the weights that it has come to; the best are for its end."""
        if self.state.global_step >= self.state.max_steps:
            super()._load_best_model()
            self._purify()

    def _place_best(self) -> None:
        """transformers takes the best checkpoint to lie where it was written: aside."""
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output = Path(self.args.output_dir)
        leads = self.is_world_process_zero()
        with staged(output) if leads else nullcontext(output) as aside:
            aside = as_leader(aside)  # it is there, and all write into it
            self._aside = aside
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
            self.accelerator.wait_for_everyone()  # every process has written its part
            self._place_best()
            if leads:
                self._finish(aside)
        if leads:
            self._rotate(str(output))
        self.accelerator.wait_for_everyone()  # the checkpoint is in its place

    def _rotate(self, output: str) -> None:
        """Keeps the newest checkpoints, and the best one besides."""
        best = self.state.best_model_checkpoint
        kept = {*sort_checkpoints(output)[-self.args.save_total_limit :], *([best] if best else [])}
        rotate_checkpoints(output, len(kept), best)

    def _finish(self, aside: Path) -> None:
        for checkpoint in aside.iterdir():
            self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))  # once more, with the place of the best
            (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing of ours reads
            if self.annotate is not None:
                self.annotate(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Left out: the run writes its own card, which says how to load the adapter."""

    def _send_telemetry(self) -> None:
        """Left out: nothing about a run leaves the machine."""


class Progress(ProgressCallback):
    """The trainer's progress bar, with the loss beside it rather than in lines of its own."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Logs = None, **kwargs: Any
    ) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{(logs or {})['loss']:.3f}")

    def close(self) -> None:
        """Ends the lines of the bars that are shown."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()


class Flow(TrainerCallback):
    """Stops after the step that is under way, with a checkpoint, when asked to; and at a loss that is no number.

    Args:
        save_every: Steps between two checkpoints before the held-out loss is measured; from then on, each measurement has one.
    """

    def __init__(self, save_every: int | None = None) -> None:
        self.interrupted, self.save_every = False, save_every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        finished = state.global_step >= state.max_steps
        if self.save_every is not None and args.load_best_model_at_end and state.global_step < args.eval_delay:
            control.should_save = state.global_step % self.save_every == 0
        self.interrupted = anywhere(self.interrupted)  # all stop at the same step
        if self.interrupted and not finished:
            control.should_save = control.should_training_stop = True
        if finished:
            control.should_save = args.load_best_model_at_end  # else the adapter itself is written next
            self.interrupted = False
        if control.should_training_stop:
            control.should_log = True
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Logs = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        loss = logs.get("loss", logs.get("eval_loss"))
        if loss is not None and not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at step {state.global_step}, so training was stopped; "
                f"lower learning_rate={args.learning_rate} or take precision=fp32"
            )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the first signal to end: Ctrl-C's, a scheduler's, a closed terminal's. A second one ends as always."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            yield
            return
        before = {number: signal.getsignal(number) for number in _ENDING if not _is_ignored(number)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def stop(number: int, _: FrameType | None) -> None:
            self.interrupted = True
            restore()
            again = "press it" if number == signal.SIGINT else "send it"
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            text = f"\n{name}: finishing this step, then saving a checkpoint; {again} again to stop at once.\n"
            with suppress(OSError):  # the terminal may be gone
                os.write(2, text.encode())

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            restore()


def _is_ignored(number: signal.Signals) -> bool:
    """By who started the process, as `nohup` does; or taken by other than Python code. A Ctrl-C is always meant."""
    return number != signal.SIGINT and signal.getsignal(number) in (signal.SIG_IGN, None)
