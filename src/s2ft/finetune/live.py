"""A run while it trains, in the terminal; quiet where there is none.

training ━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━ 120/300 0:01:10 left 0:01:45
loss 1.234 ▇▆▅▄▃▃▂▂▁  held out 1.310  rate 2.1e-03  5,120 tokens/s  1.2 GB
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from s2ft.runtime.memory import held_bytes

BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # losses that the small curve shows, the newest last


@dataclass
class Figures:
    """The newest figures of a run."""

    losses: list[float] = field(default_factory=list)
    held_out: float | None = None
    rate: float | None = None
    speed: float | None = None  # tokens per second since the figures before
    memory: int | None = None  # bytes
    seen: tuple[float, float] = (0.0, 0.0)  # when, and tokens until then

    def take(self, logs: dict[str, Any], now: float, memory: int) -> None:
        """Takes what the trainer logs, at `now` seconds."""
        if "eval_loss" in logs:
            self.held_out = logs["eval_loss"]
        if "loss" not in logs:
            return
        self.losses.append(logs["loss"])
        self.rate, self.memory = logs.get("learning_rate"), memory
        before, tokens = self.seen
        self.seen = now, logs.get("num_tokens", tokens)
        if now > before:
            self.speed = (self.seen[1] - tokens) / (now - before)

    def words(self) -> str:
        """One line."""
        parts = [f"loss {self.losses[-1]:.3f} {small_curve(self.losses[-_WIDTH:])}"] if self.losses else []
        parts += [] if self.held_out is None else [f"held out {self.held_out:.3f}"]
        parts += [] if self.rate is None else [f"rate {self.rate:.1e}"]
        parts += [] if not self.speed else [f"{self.speed:,.0f} tokens/s"]
        parts += [] if self.memory is None else [f"{self.memory / 1e9:.2f} GB"]
        return "  ".join(parts)


def small_curve(values: list[float]) -> str:
    """A curve in one line of text, from the lowest value to the highest.

    Example:
        >>> small_curve([3.0, 2.0, 1.0, 1.5])
        '█▅▁▃'
    """
    low, high = min(values), max(values)
    steps = (len(BARS) - 1) / ((high - low) or 1)
    return "".join(BARS[round((value - low) * steps)] for value in values)


class LiveView(TrainerCallback):
    """The view, in the leading process alone."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.figures = Figures()
        self._live: Live | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins, where there is a terminal."""
        self.figures.seen = time.perf_counter(), state.log_history[-1].get("num_tokens", 0) if state.log_history else 0
        if state.is_world_process_zero and self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn()
            self._bar = Progress(*columns, "left", TimeRemainingColumn(), console=self.console)
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self._live = Live(get_renderable=self._shown, console=self.console)
            self._live.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar."""
        self._tell(completed=state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says that the held-out loss is being measured."""
        self._tell(description="measuring")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes the figures."""
        if self._live is not None and model is not None:
            device = next(model.parameters()).device
            self.figures.take(logs or {}, time.perf_counter(), held_bytes(device))
            self._tell(description="training")

    def close(self) -> None:
        """Leaves the last figures in the terminal, and what is printed next below them."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _tell(self, **what: Any) -> None:
        if self._live is not None:
            self._bar.update(self._task, **what)

    def _shown(self) -> RenderableType:
        return Group(self._bar, Text(self.figures.words(), style="dim", no_wrap=True, overflow="ellipsis"))
