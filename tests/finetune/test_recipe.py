"""Batch and learning rate where nobody gave them: enough steps, a rate for the slices, a word where a run is too short."""

import json
import logging
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from live import same
from s2ft import S2FTConfig, S2FTError
from s2ft.demo import base_path
from s2ft.demo.skills import STUDY_SKILLS
from s2ft.finetune.methods import METHODS
from s2ft.finetune.objectives import OBJECTIVES
from s2ft.finetune.options import TrainOptions, parse_options, read_config
from s2ft.finetune.recipe import mean_channels, settle_batch, settle_rate, too_short
from s2ft.finetune.resume import Paused
from tiny_runs import interrupt_at, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def options(**values) -> TrainOptions:
    return parse_options({"model": "m", "data": "d", "output": "o", **values})


@pytest.fixture
def run(base, data, tmp_path):
    def call(output: str = "out", **values):
        paths = {"model": base, "data": data, "output": str(tmp_path / output)}
        return train(parse_options({**paths, "precision": "fp32", "layout": "in-place", "log_every": 1, **values}))

    return call


@settings(deadline=None)
@given(rows=st.integers(1, 200_000), epochs=st.floats(0.5, 20))
def test_there_are_a_hundred_steps_wherever_the_data_suffices_and_at_most_the_papers_examples_in_each(rows, epochs):
    settled = settle_batch(options(epochs=epochs), rows).options
    step = settled.batch_size * settled.gradient_accumulation
    steps = math.ceil(rows / step) * epochs
    assert 1 <= step <= 64
    assert settled.batch_size <= 4
    assert step == 1 or steps >= 100
    assert step == 64 or steps <= 250  # and no more than that costs, rounding apart


@pytest.mark.parametrize(
    ("given", "rows", "batch", "reason"),
    [
        ({}, 200, (4, 1), "4 examples a step: 200 examples in 3 epochs are 150 steps"),
        ({}, 50, (1, 1), "1 example a step: 50 examples in 3 epochs are 150 steps"),
        ({}, 50_000, (4, 16), "64 examples a step: 50,000 examples in 3 epochs are 2,344 steps"),
        ({"recipe": "paper"}, 200, (4, 16), "64 examples a step, as in the paper"),
        ({"recipe": "paper", "batch_size": 8}, 200, (8, 8), "64 examples a step, as in the paper"),
        ({"batch_size": 2, "gradient_accumulation": 3}, 200, (2, 3), "6 examples a step, as asked"),
        ({"gradient_accumulation": 1}, 30, (4, 1), "4 examples a step: 30 examples in 3 epochs are 23 steps"),
        ({"max_steps": 1000}, 200, (4, 1), "4 examples a step: 1,000 steps, as asked"),
        ({"batch_size": 2}, 200, (2, 2), "4 examples a step: 200 examples in 3 epochs are 150 steps"),
        ({"batch_size": 32}, 200, (32, 1), "32 examples a step: 200 examples in 3 epochs are 19 steps"),
        ({"packing": True}, 100, (2, 1), "2 rows a step: 100 rows in 3 epochs are 150 steps"),
    ],
)
def test_what_is_given_stays_and_what_is_open_follows(given, rows, batch, reason):
    settled = settle_batch(options(**given), rows)
    assert (settled.options.batch_size, settled.options.gradient_accumulation) == batch
    assert settled.reason == reason


def test_processes_share_a_step(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rows, batch in ((200, (2, 1)), (50, (1, 1)), (50_000, (4, 8))):
        settled = settle_batch(options(), rows).options
        assert (settled.batch_size, settled.gradient_accumulation) == batch


def test_the_rate_falls_with_the_root_of_channels_and_steps_and_rises_with_that_of_the_examples_a_step():
    """0.3 × √(examples / 16) / √(channels × steps), on slices whose sizes are written out here."""
    config = S2FTConfig(slices={"a": "in 0-29", "b": "out 0-47"})
    channels = mean_channels(config)
    assert channels == 39
    assert mean_channels(LoraConfig()) is None
    for rows, steps, share, seen in (
        (50, 150, 1 / 4, " of 1 example"),
        (200, 150, 1 / 2, " of 4 examples"),
        (50_000, 2346, 1, ""),
    ):
        settled = settle_rate(settle_batch(options(), rows).options, rows, channels)
        expected = pytest.approx(0.3 * share / math.sqrt(39 * steps), rel=0.05)  # two digits
        assert settled.options.learning_rate == expected
        assert settled.reason == f"for {steps:,} steps{seen} and 39 channels in a slice"
    shortest = settle_batch(options(max_steps=1), 9).options
    assert settle_rate(shortest, 9, 1).options.learning_rate == 0.02  # the most


@pytest.mark.parametrize("method", METHODS)
def test_the_papers_rates_are_one_word_away_and_a_given_rate_stays(method):
    paper = settle_rate(options(method=method, recipe="paper"), 200, 39 if method == "s2ft" else None).options
    expected = {"s2ft": 2e-4, "full": 1e-5, "lora": 5e-5, "dora": 5e-5, "galore": 1e-5, "lisa": 1e-5}
    expected["paca"] = 2e-4  # as for S²FT
    assert paper.learning_rate == expected[method] == METHODS[method].learning_rate
    assert settle_rate(options(method=method, learning_rate=3), 200, None).options.learning_rate == 3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_run_at_the_rules_rate_is_called_too_short(objective):
    more = {"reward_function": "r.py:f"} if objective == "grpo" else {}
    given = TrainOptions(model="m", data=["d"], output="o", objective=objective, **more)
    settled = settle_rate(settle_batch(given, 2_000).options, 2_000, 39).options
    assert too_short(settled, 100, 39) is None
    low = settled.model_copy(update={"learning_rate": settled.learning_rate / 30})
    advised = float(re.search(r"the rule's is (\S+)$", too_short(low, 100, 39))[1])
    assert advised == pytest.approx(settled.learning_rate, rel=2), "not twenty times as high"


@pytest.mark.parametrize(
    ("rate", "steps", "short"),
    [(2e-4, 12, True), (2e-4, 150, True), (5e-3, 11, False), (3.9e-3, 150, False), (2e-2, 9, True)],
)
def test_a_run_that_did_not_teach_a_real_model_is_called_too_short_and_one_that_did_is_not(rate, steps, short):
    """SmolLM2-135M, 39 channels: after 12 steps at 2e-4 no trace of the style, after 11 at 5e-3 it has it."""
    told = too_short(settle_batch(options(learning_rate=rate), 200).options, steps, 39)
    assert (told is not None) == short
    assert told is None or told.startswith(f"{steps} steps at a rate of {rate:g} will hardly move the model: give more")


@pytest.mark.parametrize(
    ("given", "steps", "channels", "advice"),
    [
        (
            {"recipe": "paper"},
            12,
            39,
            "more epochs than 3, fewer examples a step than 64 (batch_size, gradient_accumulation), or a higher "
            "learning_rate: the rule's is 0.014",
        ),
        ({"epochs": 0.1}, 1, 2, "more epochs than 0.1, or a higher learning_rate: the rule's is 0.02"),
        ({"max_steps": 12}, 12, 39, "more steps than max_steps=12, or a higher learning_rate: the rule's is 0.0035"),
        ({"optim": "sgd", "max_steps": 5}, 5, 39, "more steps than max_steps=5, or a higher learning_rate"),
        ({"method": "lora", "max_steps": 5}, 5, None, "more steps than max_steps=5, or a higher learning_rate"),
    ],
)
def test_a_run_that_is_too_short_is_told_what_to_change_from_what(given, steps, channels, advice):
    told = too_short(settle_batch(options(learning_rate=2e-4, **given), 20).options, steps, channels)
    unit = "step" if steps == 1 else "steps"
    assert told == f"{steps} {unit} at a rate of 0.0002 will hardly move the model: give {advice}"


def test_of_other_methods_the_steps_are_counted():
    lora = settle_batch(options(method="lora", learning_rate=1e-4), 200).options
    assert too_short(lora, 12, None) is not None
    assert too_short(lora, 150, None) is None


def test_defaults_teach_a_small_data_set_and_the_papers_recipe_does_not(run, tmp_path, caplog):
    """40 examples of a new skill for the embedded base: 120 steps here, 3 there."""
    caplog.set_level(logging.INFO, logger="s2ft")
    ends = tmp_path / "ends.jsonl"
    ends.write_text("".join(json.dumps(example) + "\n" for example in STUDY_SKILLS["ends"].examples(40, seed=0)))
    embedded = {"model": str(base_path()), "data": str(ends), "strategy": "weight"}  # a base that cannot read
    ours = run(**embedded)
    assert "batch: 1 example a step: 40 examples in 3 epochs are 120 steps" in caplog.messages
    training = ours.card["training"]
    assert training["learning_rate"] == ours.card["options"]["learning_rate"]
    assert f"learning rate: {training['learning_rate']:g}, {training['learning_rate_reason']}" in caplog.messages
    assert not any("hardly" in message for message in caplog.messages)
    papers = run("paper", **embedded, recipe="paper")
    assert "3 steps at a rate of 0.0002 will hardly move the model" in caplog.text
    start = papers.card["loss_curve"][0][1]
    assert papers.card["training"]["final_loss"] > 0.9 * start
    assert training["final_loss"] < 0.3 * start
    again = parse_options(read_config(str(ours.output / "run.yaml")))
    assert (again.batch_size, again.gradient_accumulation, again.learning_rate) == (1, 1, training["learning_rate"])


def test_what_was_open_is_settled_once_for_a_run_that_is_resumed(run, monkeypatch):
    whole = run("whole", ratios=0.25, max_steps=8)
    interrupt_at(monkeypatch, 4)
    paused = run("paused", ratios=0.25, max_steps=8)
    assert paused.interrupted
    monkeypatch.undo()
    resumed = run("paused", ratios=0.25, max_steps=8, resume=True)
    assert same(weights(resumed.output), weights(whole.output))
    assert resumed.card["options"]["learning_rate"] == whole.card["options"]["learning_rate"] is not None


def test_a_checkpoint_of_an_older_version_goes_on_at_the_papers_rate(tmp_path):
    noted = {**options().model_dump(mode="json"), "batch_size": 4, "gradient_accumulation": 16, "learning_rate": None}
    del noted["recipe"]
    (tmp_path / "run.json").write_text(json.dumps({"options": noted, "data": {"digest": "digest"}}))
    paused = Paused.read(tmp_path)
    paused.check_same_run(options(), "digest")
    before = paused.settle(options())
    assert (before.batch_size, before.gradient_accumulation, before.learning_rate) == (4, 16, 2e-4)
    with pytest.raises(S2FTError, match=r"learning_rate=0\.5, but .* was made with learning_rate=0\.0002$"):
        paused.check_same_run(options(learning_rate=0.5), "digest")
