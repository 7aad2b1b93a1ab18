"""`learning_rate=auto`: which rate it takes, that it leaves nothing behind, and what it costs at most."""

import json
import logging
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from live import same
from s2ft import S2FTError
from s2ft.finetune import search as module_under_test
from s2ft.finetune.options import TrainOptions, parse_options, read_config
from s2ft.finetune.search import climb, plan_tries
from s2ft.finetune.trainer import Trainer
from s2ft.runtime.models import load_tokenizer
from tiny_runs import interrupt_at, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS: dict[str, dict[str, Any]] = {
    "s2ft": {"ratios": 0.25, "layout": "in-place"},
    "lora": {"method": "lora", "lora_rank": 4},
    "dora": {"method": "dora", "lora_rank": 4},
}


@pytest.fixture
def run(base, data, tmp_path):
    """Steps of four of the 40 examples."""

    def call(name: str = "s2ft", output: str = "out", **options):
        settings = {"model": base, "data": data, "output": str(tmp_path / output), "learning_rate": "auto"}
        settings |= {"max_steps": 10, "batch_size": 4, "precision": "fp32", "log_every": 2}
        return train(parse_options({**settings, **METHODS[name], **options}))

    return call


@pytest.fixture
def short(monkeypatch):
    """Lets a run of ten steps have tries of four."""
    monkeypatch.setattr(module_under_test, "SHARE", 5)
    monkeypatch.setattr(module_under_test, "MOST_STEPS", 4)


def options(**values: Any) -> TrainOptions:
    settled = {"batch_size": 1, "gradient_accumulation": 1, "learning_rate": "auto", **values}
    return parse_options({"model": "m", "data": "d", "output": "o", **settled})


@settings(deadline=None)
@given(best=st.floats(0.12, 16.5), start=st.floats(1e-6, 1.0))
def test_it_climbs_to_the_nearest_power_of_two_and_tries_no_rate_twice(best, start):
    tried = []

    def loss_at(rate: float) -> float:
        tried.append(rate)
        return abs(math.log2(rate / start) - math.log2(best))

    losses = climb(loss_at, start)
    assert list(losses) == tried
    assert len(tried) == len(set(tried)) <= 5
    assert min(losses.values()) <= 0.5 + 0.06  # of a doubling; the ends of the range are a little further away


def test_a_rate_that_leads_nowhere_is_worse_than_any_other():
    assert list(climb(lambda rate: math.inf if rate > 0.3 else 1 / rate, start=1.0)) == [1, 2, 0.5, 0.25, 0.125]


@settings(deadline=None)
@given(
    steps=st.integers(1, 30_000),
    size=st.integers(1, 8),
    accumulation=st.integers(1, 16),
    examples=st.integers(1, 60_000),
)
def test_all_tries_take_a_quarter_of_the_run_at_most(steps, size, accumulation, examples):
    given = options(batch_size=size, gradient_accumulation=accumulation)
    try:
        short = plan_tries(given, examples, steps)
    except S2FTError:
        assume(False)
    step = size * accumulation
    assert 5 * (short.steps * step + short.held_out / 2) <= steps * step / 4  # a loss takes half of a step's time
    assert 4 <= short.steps <= 100
    assert 8 <= short.held_out <= min(64, examples / 4)


@settings(deadline=None)
@given(examples=st.integers(1, 200), step=st.sampled_from([1, 2, 4, 8, 64]), epochs=st.sampled_from([1, 3, 10]))
def test_who_has_too_few_examples_is_told_how_many_suffice(examples, step, epochs):
    given = options(batch_size=step, epochs=epochs)
    try:
        plan_tries(given, examples, math.ceil(examples / step) * epochs)
    except S2FTError as error:
        enough = int(re.search(r"\((\d+) examples in \d+ epochs\)", str(error))[1])
        assert enough > examples
        plan_tries(given, enough, math.ceil(enough / step) * epochs)
        if enough > 32:
            with pytest.raises(S2FTError, match=f"here are {enough - step} examples in "):
                plan_tries(given, enough - step, (enough - step) * epochs // step)


@pytest.mark.parametrize("name", METHODS)
def test_the_run_is_the_one_with_the_rate_that_was_found(run, base, caplog, name, short):
    caplog.set_level(logging.INFO, logger="s2ft")
    found = run(name, "found")
    training, search = found.card["training"], found.card["learning_rate_search"]
    losses = {float(rate): loss for rate, loss in search["losses"].items()}
    assert training["learning_rate"] == min(losses, key=lambda rate: losses[rate]) != next(iter(losses))
    assert training["learning_rate_reason"] == f"the best of {len(losses)} tried in runs of 4 steps"
    assert f"learning rate: {training['learning_rate']:g}, {training['learning_rate_reason']}" in caplog.messages
    assert sum("held-out loss" in message for message in caplog.messages) == len(losses)
    assert not list(found.output.glob("checkpoint-*"))
    given = run(name, "given", learning_rate=training["learning_rate"])
    assert "learning_rate_search" not in given.card
    assert same(weights(found.output), weights(given.output))
    assert found.card["loss_curve"] == given.card["loss_curve"]
    assert found.card["training"]["tokens"] == given.card["training"]["tokens"]
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = {
        name.replace(".base_layer", ""): value for name, value in found.model.get_base_model().state_dict().items()
    }
    assert all(torch.equal(after[name], value) for name, value in plain.items())
    assert read_config(str(found.output / "run.yaml"))["learning_rate"] == training["learning_rate"]


@pytest.mark.parametrize("name", ["s2ft", "lora"])
def test_each_try_begins_where_the_others_began(run, monkeypatch, name, short):
    losses = []
    monkeypatch.setattr(module_under_test, "climb", lambda loss_at, start: losses.extend(map(loss_at, [start] * 3)))
    with pytest.raises(AttributeError):  # no losses: the run ends here
        run(name)
    assert len(losses) == 3
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora", "lora_rank": 4, "objective": "reward"},
        {"method": "peft:lora", "peft_config": {"r": 4, "bias": "all", "modules_to_save": ["norm"]}},
    ],
    ids=["a head", "biases and a module"],
)
def test_a_try_leaves_nothing_in_what_an_adapter_trains_of_the_model_itself(
    base, tmp_path, monkeypatch, options, short
):
    pairs = [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": f"{n + 2}"} for n in range(40)]
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    (tmp_path / "data.json").write_text(json.dumps(pairs if "objective" in options else answers))
    config = LlamaConfig.from_pretrained(base, attention_bias=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "biased")
    load_tokenizer(base).save_pretrained(tmp_path / "biased")
    losses = []
    monkeypatch.setattr(module_under_test, "climb", lambda loss_at, start: losses.extend(map(loss_at, [0.1] * 3)))
    settings = {"model": str(tmp_path / "biased"), "data": str(tmp_path / "data.json"), "output": str(tmp_path / "out")}
    settings |= {"learning_rate": "auto", "max_steps": 10, "batch_size": 4, "precision": "fp32"}
    with pytest.raises(AttributeError):  # no losses: the run ends here
        train(parse_options({**settings, **options}))
    assert losses[0] == losses[1] == losses[2]


def test_what_the_loss_is_measured_on_does_not_train_before_the_run(run, monkeypatch, short):
    trained, measured = [], []
    step, predict, prepare = Trainer.training_step, Trainer.prediction_step, Trainer.create_optimizer

    def rows(inputs: Any) -> set[tuple[int, ...]]:
        pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        return {tuple(ids[mask.bool()].tolist()) for ids, mask in pairs}

    def training_step(self, model, inputs, *args, **kwargs):
        trained[-1] |= rows(inputs)
        return step(self, model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        measured.append(rows(inputs))
        return predict(self, model, inputs, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        trained.append(set())
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    monkeypatch.setattr(Trainer, "prediction_step", prediction_step)
    monkeypatch.setattr(Trainer, "create_optimizer", create_optimizer)
    run()
    *tries, whole = trained
    assert 2 < len(tries) == len(measured) < 6
    assert len(measured[0]) == 10
    assert all(part == measured[0] and not seen & part for part, seen in zip(measured, tries, strict=True))
    assert len(whole) == 40


def test_tries_warm_up_as_the_run_does(run, monkeypatch, short):
    warmed, attempt = [], module_under_test._try
    monkeypatch.setattr(
        module_under_test,
        "_try",
        lambda trainer, layout: warmed.append(trainer.args.warmup_steps) or attempt(trainer, layout),
    )
    run(max_steps=10, warmup_steps=5)
    assert set(warmed) == {2}  # of four steps


def test_what_the_loss_is_measured_on_does_not_train_in_another_copy(run, data, monkeypatch, short):
    seen, attempt = [], module_under_test._try

    def rows(part: Any) -> set[str]:
        return {repr(row["input_ids"]) for row in part}

    def looked_at(trainer: Trainer, layout: str) -> float:
        seen.append((rows(trainer.train_dataset), rows(trainer.eval_dataset)))
        return attempt(trainer, layout)

    monkeypatch.setattr(module_under_test, "_try", looked_at)
    run(data=[data], data_weights=[3.5])
    assert seen
    assert all(trained and measured and not trained & measured for trained, measured in seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"packing": True, "max_length": 64, "batch_size": 2},
        {"precision": "pure-bf16"},
        {"holdout": 4, "validate_every": 5},
    ],
    ids=["packing", "bf16 alone", "holdout"],
)
def test_it_goes_with_other_options(run, more, short):
    result = run(**more)
    losses = list(result.card["learning_rate_search"]["losses"].values())
    assert min(losses) < losses[0]
    assert result.card["training"]["steps"] == result.card["training"]["planned_steps"]


def test_a_run_that_goes_on_keeps_the_rate_that_was_found(run, monkeypatch, short):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)  # of the run: tries are not listened to
        paused = run()
    assert paused.interrupted
    monkeypatch.setattr("s2ft.finetune.prepare.search", lambda *_: pytest.fail("searched again"))
    resumed = run(resume=True)
    for name in ("learning_rate", "learning_rate_reason"):
        assert resumed.card["training"][name] == paused.card["training"][name]
    assert resumed.card["learning_rate_search"] == paused.card["learning_rate_search"]


def test_a_loss_that_is_no_number_at_any_rate_ends_it(run, monkeypatch, tmp_path, short):
    monkeypatch.setattr(Trainer, "prediction_step", lambda *_, **__: (torch.tensor(torch.nan), None, None))
    with pytest.raises(S2FTError, match=r"learning_rate='auto': the loss is no number at 0\.0"):
        run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "full"}, "learning_rate='auto' tries rates one after the other, and with method=full each would"),
        (
            {"method": "lisa"},
            "with method=lisa each would change the model's own weights; give a rate, or take a method",
        ),
        ({"learning_rate": "best"}, "learning_rate='best': must be a number such as 2e-3, or auto"),
        ({"learning_rate": "0"}, "learning_rate='0': input should be greater than 0"),
        (
            {"max_steps": 80},
            r"needs at least 100 steps; here are 40 examples in 80 steps of 4: give more, or a rate, or ",
        ),
        ({"limit": 30, "max_steps": 100}, r"needs at least 32 examples; here are 30 examples in 100 steps of 4"),
        (
            {"max_steps": None},
            r"at least 100 steps \(134 examples in 3 epochs\); here are 40 examples in 30 steps of 4",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_written(run, tmp_path, given, message):
    of_method = {"ratios": None, "layout": None} if "method" in given else {}
    with pytest.raises(S2FTError, match=message):
        run(**of_method, **given)
    assert not (tmp_path / "out").exists()
