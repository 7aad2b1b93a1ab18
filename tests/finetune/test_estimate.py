"""What a run says of its time and memory before it starts: the sums, the words, and that a trial leaves no trace."""

import logging
import random
from math import comb

import pytest
import torch
from torch import nn

from live import same
from s2ft.finetune.estimate import Estimate, estimate, padded_tokens
from s2ft.finetune.methods import METHODS
from s2ft.finetune.options import parse_options
from s2ft.finetune.trial import Trial, try_in_turns
from tiny_runs import interrupt_at, skip_without, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

GB = 10**9


@pytest.fixture
def run(base, data, tmp_path):
    def call(output: str = "out", **values):
        paths = {"model": base, "data": data, "output": str(tmp_path / output)}
        settings = {"max_steps": 4, "precision": "fp32", "learning_rate": 0.01}
        return train(parse_options({**paths, **settings, **values}))

    return call


def test_the_sums():
    """30 frozen and 20 trained numbers in fp32; a trial of 2 × 6 tokens, a run of batches of 2 × 5."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False))
    model[0].requires_grad_(False)
    trial = Trial(milliseconds=120.0, tokens=12, kept=6000, held=7 * GB)
    found = estimate(trial, model, [5] * 8, batch_size=2, batches=3, steps=40)
    assert found.step_seconds == pytest.approx(3 * 0.120 * 10 / 12)
    assert found.trained == 3 * 20 * 4  # gradients, and two moments
    assert found.activations == 6000 * 10 / 12
    assert found.free > 0
    assert found.card == {"estimated_seconds": 12.0, "estimated_memory_bytes": 7 * GB + 240 + 5000}


def test_memory_is_that_of_the_longest_rows_and_time_of_the_usual_ones():
    lengths = [random.randrange(1, 100) for _ in range(400)]
    mean, most = padded_tokens(lengths, 4)
    ranked = sorted(lengths)
    largest = sum(length * comb(rank, 3) for rank, length in enumerate(ranked)) / comb(400, 4)  # of four, on average
    assert mean == pytest.approx(4 * largest, rel=0.1)
    assert most == 4 * ranked[-1]


def test_the_words():
    found = Estimate(150, 4.8, held=int(2.1 * GB), trained=GB // 20, activations=int(0.9 * GB), free=12 * GB)
    assert found.time == "about 12 min: 150 steps of 4.8 s"
    held = "about 3.0 GB: 2.1 GB held, 50 MB for gradients and optimizer, 900 MB for activations"
    assert found.memory == f"{held}; 12.0 GB are free"
    assert found.lack is None


def test_what_a_trial_keeps_is_what_backward_needs():
    """SiLU keeps its input, [2, 3, 4] in fp32; the trained layer keeps its own, [2, 3, 5]."""
    model = nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3))
    model[1:].requires_grad_(False)
    batch = {"input_ids": torch.randn(2, 3, 5)}
    contexts = {"alone": lambda: torch.enable_grad()}
    given = lambda model, batch: model(batch["input_ids"]).sum()  # noqa: E731
    trial = try_in_turns(given, model, batch, contexts, rounds=1)["alone"]
    assert (trial.tokens, trial.kept) == (2 * 3 * 5, 4 * 2 * 3 * (4 + 5))
    assert trial.milliseconds > 0
    assert trial.held > 10**6
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["s2ft", "lora", "full"])
def test_a_run_says_it_and_the_card_has_it_beside_the_truth(run, caplog, name):
    caplog.set_level(logging.INFO, logger="s2ft")
    training = run(method=name, batch_size=2, gradient_accumulation=2).card["training"]
    assert training["estimated_seconds"] > 0 < training["seconds"]
    assert training["estimated_memory_bytes"] > 10**7 < training["peak_memory_bytes"]
    (time,) = (message for message in caplog.messages if message.startswith("time: about "))
    assert ": 4 steps of " in time
    (memory,) = (message for message in caplog.messages if message.startswith("memory: about "))
    assert memory.endswith(" are free")


def test_a_run_is_estimated_by_what_it_will_do(run, monkeypatch):
    told = []
    monkeypatch.setattr(
        "s2ft.finetune.train.estimate", lambda *args: told.append((*map(len, args[2:3]), *args[3:])) or estimate(*args)
    )
    run("one", batch_size=2, gradient_accumulation=1)
    run("two", batch_size=4, gradient_accumulation=3, max_steps=2)
    assert told == [(40, 2, 1, 4), (40, 4, 3, 2)], "examples, batch size, batches a step, steps"


@pytest.mark.parametrize("name", ["galore", "lisa"])
def test_of_methods_whose_steps_differ_from_one_batch_nothing_is_said(run, caplog, name):
    skip_without(name)
    caplog.set_level(logging.INFO, logger="s2ft")
    assert "estimated_seconds" not in run(method=name).card["training"]
    assert not any(message.startswith(("time:", "memory:")) for message in caplog.messages)


def test_a_lack_of_memory_is_warned_of_with_what_to_lower(run, caplog, monkeypatch):
    monkeypatch.setattr("s2ft.finetune.estimate.free_bytes", lambda device: 10)
    run(batch_size=2, max_length=40, ratios=0.25)
    (warning,) = (record.message for record in caplog.records if record.message.startswith("training needs about "))
    assert "of memory, but 1 MB are free: lower batch_size=2 or max_length=40, or set gradient_ch" in warning


def test_a_trial_does_not_change_the_run(run, monkeypatch):
    """LoRA drops out at random, and the loader draws the order."""
    tried = run("tried", method="lora", lora_rank=4)
    monkeypatch.setattr(METHODS["lora"], "foreseeable", False)
    untried = run("untried", method="lora", lora_rank=4)
    assert "estimated_seconds" in tried.card["training"]
    assert "estimated_seconds" not in untried.card["training"]
    assert tried.card["loss_curve"] == untried.card["loss_curve"]
    assert same(weights(tried.output), weights(untried.output))


def test_a_resumed_run_counts_the_steps_that_are_left(run, caplog, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert run(ratios=0.25).interrupted
    caplog.clear()
    caplog.set_level(logging.INFO, logger="s2ft")
    run(ratios=0.25, resume=True)
    assert any(message.startswith("time: about ") and ": 1 step of " in message for message in caplog.messages)
