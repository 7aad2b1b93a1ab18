"""TRL's trainers with what a run here needs besides: a polite end, whole checkpoints, and nothing sent anywhere unasked.

`RunTrainer` is what all objectives share, `Trainer` supervised fine-tuning; the others are in `trainers.py`.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from datasets import Dataset
from huggingface_hub import constants
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from s2ft.common.errors import S2FTError
from s2ft.finetune.checkpoints import is_checkpoint, mark, remove_unfinished
from s2ft.finetune.engines import trained_state
from s2ft.finetune.holdout import WEIGHT, held_out_loader, summed_losses
from s2ft.finetune.live import LiveView
from s2ft.finetune.options import TrainOptions
from s2ft.layer.block import S2FTBlock
from s2ft.runtime.processes import anywhere, is_managed
from s2ft.training.rounding import round_steps

Logs = dict[str, Any] | None

_STATISTICS = ("_metrics", "_total_train_tokens", "_stored_metrics")  # TRL's, of what it will log next
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class DivergedError(S2FTError):
    """Training loss became NaN or infinite."""


class RunTrainer(transformers.Trainer):
    """What every run shares: marks a checkpoint while it is written, and measures without moving the random numbers.

    Args:
        pure_bf16: Trains bf16 deltas, in steps that are rounded stochastically.
    """

    config_class: type[TrainingArguments]  # of the TRL trainer beside this class
    counts_anew = True  # tokens, when a run goes on

    @staticmethod
    def settings(options: TrainOptions, max_length: int) -> dict[str, Any]:
        """Arguments of `config_class` beside those of every run."""
        return {"max_length": None, "per_device_eval_batch_size": options.batch_size}  # rows are cut already

    @staticmethod
    def lengths(dataset: Dataset) -> list[int]:
        """Tokens that each row takes in a batch."""
        raise NotImplementedError

    def __init__(self, *args: Any, pure_bf16: bool = False, **kwargs: Any) -> None:
        with _no_telemetry():
            super().__init__(*args, **kwargs)
        self.pure_bf16 = pure_bf16
        if not pure_bf16:
            _keep_fp32(self.model, by_autocast=self.args.bf16)
        if pure_bf16:
            self.add_callback(_PureBf16())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; ends the view in the terminal, and leaves no half-written checkpoint if it fails."""
        try:
            return super().train(*args, **kwargs)
        except BaseException:
            if self.is_world_process_zero():
                remove_unfinished(Path(self.args.output_dir))
            raise
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LiveView):
                    callback.close()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with `pure_bf16`, over bf16 deltas, in stochastically rounded steps."""
        if self.pure_bf16:
            _to_bf16(self.model)
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.pure_bf16:
            round_steps(optimizer)
        return optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As in transformers, which would take one step too many after a run that was killed at its last checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; training goes on with the random numbers that it would have had without."""
        with torch.random.fork_rng(devices=[]):  # a loader draws from the CPU's; in evaluation nothing else is drawn
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def loss_of(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch, as training computes it; TRL's statistics stay as they are."""
        kept = {name: copy.deepcopy(getattr(self, name)) for name in _STATISTICS if hasattr(self, name)}
        try:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(model, dict(batch))
        finally:
            self.__dict__.update(kept)
        return loss

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As in transformers, where it is the first to write into a checkpoint; an engine gathers what is trained, no more."""
        if output_dir is not None and is_checkpoint(Path(output_dir)):
            mark(Path(output_dir))
        if output_dir is None or not is_managed():
            super().save_model(output_dir, *args, **kwargs)
            return
        state = trained_state(self.model)
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Left out: the run writes its own card, which says how to load the adapter."""


class Trainer(RunTrainer, SFTTrainer):
    """Supervised fine-tuning, by TRL's SFTTrainer."""

    config_class = SFTConfig

    @staticmethod
    def settings(options: TrainOptions, max_length: int) -> dict[str, Any]:
        """Packing, and batches of the held-out loader, each of which counts as one example."""
        return {
            "max_length": max_length if options.packing else None,  # unpacked rows are cut already
            "packing": options.packing,
            # Best-fit packing keeps examples whole. Its rows carry positions that start over with each example, from which
            # transformers builds a mask that keeps examples apart, on a CPU too; `check_packing` proves it for the model.
            "packing_strategy": "bfd",
            "eval_packing": False,
            "per_device_eval_batch_size": 1,
        }

    @staticmethod
    def lengths(dataset: Dataset) -> list[int]:
        """Tokens of each row, packed or not."""
        return list(map(len, dataset["input_ids"]))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Held-out examples in batches of similar length; for transformers, which counts batches, each is one example."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = held_out_loader(rows, self.data_collator, self.args.per_device_train_batch_size)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """A held-out batch's part of the mean over examples; TRL's, a mean over tokens, depends on what a batch holds."""
        inputs = dict(inputs)
        weight = inputs.pop(WEIGHT)
        with torch.no_grad():
            outputs = self.forward(model, inputs)
        return weight * summed_losses(outputs.log_probs, outputs.label_mask), None, None

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """What training computes for a batch, but for TRL's statistics: log-probabilities and loss, without logits."""
        with self.accelerator.autocast():  # where it is on
            return model(**batch, use_cache=False, fused_lm_head=True)

    def loss_of(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch, without the time that TRL's statistics take."""
        loss: Tensor = self.forward(model, batch).loss
        return loss


@contextmanager
def _no_telemetry() -> Iterator[None]:
    """TRL reports each trainer that is made to the Hub; nothing about a run is to leave the machine."""
    before, constants.HF_HUB_DISABLE_TELEMETRY = constants.HF_HUB_DISABLE_TELEMETRY, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before


def _to_bf16(model: nn.Module) -> None:
    """PEFT brings the deltas that it loads from a checkpoint to fp32; this brings them back."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def _keep_fp32(model: nn.Module, by_autocast: bool) -> None:
    """On a base that bitsandbytes quantised, TRL casts all that trains to bf16, where small steps would be lost.

    Args:
        by_autocast: What PEFT's other methods add may be fp32, too; S²FT's slices bring their input to their own dtype.
    """
    kinds = (S2FTBlock, BaseTunerLayer) if by_autocast else (S2FTBlock,)
    for module in model.modules():
        if isinstance(module, kinds):
            for parameter in module.parameters():
                if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                    parameter.data = parameter.data.float()


class _PureBf16(TrainerCallback):
    """Keeps the deltas bf16 when the best ones have been loaded at the end."""

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        _to_bf16(model)


class Flow(TrainerCallback):
    """Stops after the current step, with a checkpoint, when interrupted; stops at once when the loss becomes NaN.

    Args:
        save_every: Steps between two checkpoints before the held-out loss is measured; from then on, each measurement has one.
        saves_end: There is a checkpoint of the last step, too, for something long that comes after it.
    """

    def __init__(self, save_every: int | None = None, saves_end: bool = False) -> None:
        self.interrupted, self.save_every, self.saves_end = False, save_every, saves_end

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs and saves as often as is asked for now; a checkpoint brings the intervals of the run before."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Decides whether a checkpoint is due and whether the run is over."""
        finished = state.global_step >= state.max_steps
        if self.save_every is not None and args.load_best_model_at_end and state.global_step < args.eval_delay:
            control.should_save = state.global_step % self.save_every == 0
        self.interrupted = anywhere(self.interrupted)  # all processes stop at the same step
        if self.interrupted and not finished:
            control.should_save = control.should_training_stop = True
            args.load_best_model_at_end = False  # the run leaves the weights that it has come to
        if finished:
            control.should_save = (
                args.load_best_model_at_end or self.saves_end
            )  # else the adapter itself is written next
            self.interrupted = False
        if control.should_training_stop:
            control.should_log = True
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Logs = None, **kwargs: Any
    ) -> None:
        """Raises `DivergedError` if the loss is not finite."""
        logs = logs or {}
        loss = logs.get("loss", logs.get("eval_loss"))
        if loss is not None and not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at step {state.global_step}, so training was stopped; "
                f"lower learning_rate={args.learning_rate} or take precision=fp32"
            )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the first SIGINT, SIGTERM or SIGHUP by finishing the step; a second one has its usual effect."""
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
    """Whether a signal is ignored, as under `nohup`, or handled outside of Python. SIGINT never counts as ignored."""
    return number != signal.SIGINT and signal.getsignal(number) in (signal.SIG_IGN, None)
