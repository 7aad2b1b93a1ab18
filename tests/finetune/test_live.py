"""The view in the terminal: its figures against what the trainer logged, and silence where there is no terminal."""

import io
import random
from types import SimpleNamespace

import pytest
from rich.console import Console

from s2ft.finetune.live import BARS, Figures, LiveView, small_curve
from s2ft.finetune.options import parse_options
from tiny_base import tiny_model
from tiny_runs import train


def terminal(is_terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=150, color_system=None)


def test_speed_is_of_the_tokens_since_the_figures_before() -> None:
    figures = Figures(seen=(10.0, 500.0))
    figures.take({"loss": 2.0, "learning_rate": 1e-3, "num_tokens": 900.0}, now=12.0, memory=3_000_000_000)
    figures.take({"loss": 1.5, "learning_rate": 5e-4, "num_tokens": 1000.0}, now=12.5, memory=2_500_000_000)
    figures.take({"eval_loss": 1.75}, now=20.0, memory=0)
    assert figures.words() == "loss 1.500 █▁  held out 1.750  rate 5.0e-04  200 tokens/s  2.50 GB"


def test_the_small_curve_rises_with_the_values() -> None:
    values = [random.uniform(-5, 5) for _ in range(20)]
    heights = [BARS.index(letter) for letter in small_curve(values)]
    assert (min(heights), max(heights)) == (0, 7)
    assert [heights[i] for i in sorted(range(20), key=values.__getitem__)] == sorted(heights)
    assert small_curve([1.0, 1.0]) == "▁▁"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_it_shows_a_run_in_a_terminal_and_is_quiet_elsewhere(is_terminal) -> None:
    console = terminal(is_terminal)
    view, model = LiveView(console), tiny_model()
    state = SimpleNamespace(is_world_process_zero=True, max_steps=9, global_step=0, log_history=[])
    view.on_train_begin(None, state, None)
    for step in (1, 2):
        state.global_step = step
        view.on_step_end(None, state, None)
        view.on_log(None, state, None, {"loss": 3.0 / step, "learning_rate": 0.1, "num_tokens": 64 * step}, model)
    view.close()
    printed = console.file.getvalue()
    assert ("2/9" in printed and "loss 1.500" in printed and "tokens/s" in printed and "GB" in printed) == is_terminal
    assert bool(printed) == is_terminal


def test_a_run_shows_what_its_card_says(base, data, tmp_path, monkeypatch) -> None:
    console = terminal()
    monkeypatch.setattr("s2ft.finetune.live.Console", lambda **_: console)
    options = {"model": base, "data": data, "output": str(tmp_path / "out"), "max_steps": 4, "log_every": 1}
    options |= {"ratios": 0.25, "holdout": 4, "validate_every": 1, "precision": "fp32", "layout": "indexed"}
    card = train(parse_options(options)).card
    printed = console.file.getvalue()
    assert "4/4" in printed
    assert f"loss {card['loss_curve'][-1][1]:.3f}" in printed
    assert f"held out {card['held_out_curve'][-1][1]:.3f}" in printed
