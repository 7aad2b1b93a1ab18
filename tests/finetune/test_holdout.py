"""Held-out examples: they never train, they choose the weights, and a run that goes on chooses the same."""

import json
import random
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from live import same
from s2ft import S2FTError
from s2ft.data.examples import load_examples
from s2ft.data.tokens import hold_out, tokenize
from s2ft.finetune.holdout import batches_by_length
from s2ft.finetune.methods import METHODS
from s2ft.finetune.options import TrainOptions, parse_options, read_config
from s2ft.finetune.trainer import Flow, Trainer
from tiny_runs import interrupt_at, skip_without, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES, HELD_OUT = 40, 6
RUNS: dict[str, dict[str, Any]] = {
    "in place": {"ratios": 0.25, "layout": "in-place"},
    "indexed": {"ratios": 0.25, "layout": "indexed"},
    "bf16 alone": {"ratios": 0.25, "layout": "in-place", "precision": "pure-bf16"},
    "full": {"method": "full", "learning_rate": 1e-3},
    "lora": {"method": "lora", "lora_rank": 4},
    "dora": {"method": "dora", "lora_rank": 4},
    "galore": {"method": "galore", "galore_rank": 4},
    "lisa": {"method": "lisa", "lisa_layers": 1, "lisa_interval": 2},
}
BEST = 5  # the step, after which the learning rate leaps


def options_of(name: str, **options: Any) -> TrainOptions:
    """Eight steps, of which the last five are measured, unless told otherwise."""
    skip_without(name)
    settings = {"holdout": HELD_OUT, "validate_every": 1, "max_steps": 8, "gradient_accumulation": 1, "log_every": 1}
    settings |= {"learning_rate": 1e-2, "schedule": "constant", "precision": "fp32"}
    return parse_options({**settings, **RUNS[name], **options})


@pytest.fixture
def run(base, data, tmp_path):
    def call(name: str = "in place", output: str = "out", **options):
        paths = {"model": base, "data": data, "output": str(tmp_path / output)}
        return train(options_of(name, **{**paths, **options}))

    return call


@pytest.fixture(scope="module")
def leapt(base, data, tmp_path_factory):
    """The run of a name whose weights leap after step `BEST`, trained once for all tests."""

    @cache
    def call(name: str):
        with pytest.MonkeyPatch.context() as patch:
            leap(patch)
            return train(options_of(name, model=base, data=data, output=str(tmp_path_factory.mktemp("leapt") / "out")))

    return call


def leap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the weights worse than they were after step `BEST`."""
    begin = Flow.on_step_begin

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == BEST:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    place = torch.arange(parameter.numel(), device=parameter.device)
                    parameter.data.add_(torch.where(place % 2 == 0, 1, -1).view_as(parameter))
        return begin(self, args, state, control, model=model, **kwargs)

    monkeypatch.setattr(Flow, "on_step_begin", on_step_begin)


def parts(base: str, data: str, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The examples to train on, and those held out."""
    tokens = tokenize(load_examples([data]), AutoTokenizer.from_pretrained(base), 512)
    left, held_out = hold_out(tokens, HELD_OUT, seed)
    assert held_out is not None
    return left.dataset, held_out


def rows(dataset: Dataset) -> set[tuple[int, ...]]:
    return {tuple(ids) for ids in dataset["input_ids"]}


def loss_of(model: torch.nn.Module, held_out: Dataset) -> float:
    """The mean over examples of the mean over the response's tokens, in plain torch."""
    losses = []
    for row in held_out:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            losses.append(F.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], ignore_index=-100))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("name", RUNS)
def test_the_result_is_the_weights_with_the_lowest_loss(leapt, base, data, name):
    result = leapt(name)
    curve, told = result.card["held_out_curve"], result.card["training"]
    assert [step for step, _ in curve] == [4, 5, 6, 7, 8]
    assert (told["best_step"], told["best_loss"]) == min(curve, key=lambda point: point[1])
    assert told["best_step"] < 8
    assert told["held_out"] == HELD_OUT
    assert result.card["data"]["examples"] == EXAMPLES - HELD_OUT
    assert same(weights(result.output), weights(result.output / f"checkpoint-{told['best_step']}"))
    assert not same(weights(result.output), weights(result.output / "checkpoint-8"))
    assert {path.name for path in result.output.glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (told["best_step"], 7, 8)
    }
    assert not list(result.output.rglob("training_args.bin"))
    model = AutoModelForCausalLM.from_pretrained(str(result.output) if METHODS[told["method"]].leaves_model else base)
    if not METHODS[told["method"]].leaves_model:
        model = PeftModel.from_pretrained(model, result.output)
    if name != "bf16 alone":
        assert loss_of(model.eval(), parts(base, data)[1]) == pytest.approx(told["best_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["in place", "indexed"])
def test_the_base_is_as_before(leapt, base, name):
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = leapt(name).model.get_base_model().state_dict()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in after.items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_held_out_examples_never_train_and_all_others_do(run, base, data, monkeypatch):
    trained, calibrated = set(), []
    step = Trainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            trained.add(tuple(ids[mask.bool()].tolist()))
        return step(self, model, inputs, *args, **kwargs)

    def choose(options, model, examples):
        calibrated.append(rows(examples.tokens))
        return choose_channels(options, model, examples)

    from s2ft.finetune.channels import choose_channels

    monkeypatch.setattr(Trainer, "training_step", watched)
    monkeypatch.setattr("s2ft.finetune.channels.choose_channels", choose)
    run(strategy="activation", max_steps=None, epochs=1, train_seed=3)
    left, held_out = (rows(part) for part in parts(base, data, seed=3))
    assert trained == left
    assert calibrated == [left]
    assert len(held_out) == HELD_OUT
    assert not trained & held_out


def test_the_seed_decides_which_are_held_out(base, data):
    drawn = [rows(parts(base, data, seed)[1]) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_chooses_the_same_weights(run, leapt, tmp_path, monkeypatch, name):
    whole = leapt(name)
    with monkeypatch.context() as patch:
        leap(patch)
        interrupt_at(patch, 6)
        paused = run(name, "paused")
    assert paused.interrupted
    assert same(weights(paused.output), weights(paused.output / "checkpoint-6"))  # as it stands, not the best
    paused.output.rename(tmp_path / "moved")
    with monkeypatch.context() as patch:
        leap(patch)
        resumed = run(name, "moved", resume=True)
    assert resumed.card["held_out_curve"] == whole.card["held_out_curve"]
    assert resumed.card["loss_curve"] == whole.card["loss_curve"]
    assert resumed.card["training"]["best_step"] == whole.card["training"]["best_step"] < 6
    for folder in (".", "checkpoint-8"):  # the best weights, and the last
        assert same(weights(resumed.output / folder), weights(whole.output / folder))


def test_a_run_that_was_killed_at_its_end_goes_on_to_the_same_weights(run, monkeypatch):
    whole = run(output="whole", max_steps=6)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("s2ft.finetune.train.save_result", killed)
        with pytest.raises(KeyboardInterrupt):
            run(max_steps=6)
    resumed = run(max_steps=6, resume=True)
    assert resumed.card["training"]["steps"] == 6
    assert same(weights(resumed.output), weights(whole.output))


def test_measuring_does_not_move_the_random_numbers_of_training(run):
    often, once = run("lora", "often"), run("lora", "once", validate_every=1000)
    assert [step for step, _ in once.card["held_out_curve"]] == [8]  # the end is always measured
    assert often.card["loss_curve"] == once.card["loss_curve"]
    assert once.card["held_out_curve"][-1] == often.card["held_out_curve"][-1]


def test_before_anything_is_measured_checkpoints_are_as_far_apart_as_without(run, monkeypatch):
    written, save = [], Trainer._save_checkpoint

    def watched(self, *args, **kwargs):
        written.append(self.state.global_step)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_save_checkpoint", watched)
    run(max_steps=12, save_every=2)
    assert written == [2, 4, *range(6, 13)]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_loss_in_batches_is_that_of_one_example_at_a_time(run, base, tmp_path, monkeypatch, packing):
    """Of responses between 1 and 60 tokens; a mean over tokens, or one that sees the padding, would be another number."""
    rows = [{"prompt": f"{n}=", "completion": "ab" * random.randrange(1, 30)} for n in range(40)]
    data = tmp_path / "lengths.json"
    data.write_text(json.dumps(rows))
    shapes, step = [], Trainer.prediction_step

    def watched(self, model, inputs, *args, **kwargs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "prediction_step", watched)
    result = run(data=str(data), holdout=21, batch_size=2, packing=packing, max_length=64, max_steps=1)
    held_out = hold_out(tokenize(load_examples([str(data)]), AutoTokenizer.from_pretrained(base), 64), 21, 0)[1]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.output)
    assert result.card["training"]["best_loss"] == pytest.approx(loss_of(model.eval(), held_out), rel=1e-5)
    assert sum(rows for rows, _ in shapes) == 21
    assert 1 < len(shapes) < 5
    longest = max(map(len, held_out["input_ids"]))
    assert all(rows * length <= 4 * 2 * longest for rows, length in shapes)


@given(lengths=st.lists(st.integers(1, 50), min_size=1), tokens=st.integers(1, 200))
def test_batches_hold_every_row_once_and_no_more_tokens_than_allowed(lengths, tokens):
    batches = batches_by_length(lengths, tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= tokens


def test_the_options_survive_their_yaml(run):
    result = run(max_steps=1)
    again = parse_options(read_config(str(result.output / "run.yaml")))
    assert (again.holdout, again.validate_every) == (HELD_OUT, 1)
    assert "held_out" not in run(output="plain", max_steps=1, holdout=None).card["training"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 40}, "holdout=40 leaves nothing to train on: 40 examples are usable"),
        ({"holdout": 10, "limit": 10}, "holdout=10 leaves nothing to train on: 10 examples"),
        ({"holdout": 0}, "holdout=0: input should be greater than 0"),
        ({"holdout": "half"}, "holdout='half': input should be a valid integer"),
        ({"validate_every": 0}, "validate_every=0: input should be greater than 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(run, tmp_path, options, message):
    with pytest.raises(S2FTError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_what_is_held_out_cannot_change_when_a_run_goes_on(run, monkeypatch):
    with monkeypatch.context() as patch:
        leap(patch)
        interrupt_at(patch, 7)
        paused = run()
    for options in ({"holdout": 5}, {"holdout": None}, {"validate_every": 2}):
        with pytest.raises(S2FTError, match="was made with"):
            run(resume=True, **options)
    (paused.output / "checkpoint-5").rename(paused.output / "mine")
    with pytest.raises(S2FTError, match="has no checkpoint-5 any more, whose held-out loss is the lowest so far"):
        run(resume=True)


def test_a_held_out_loss_that_is_no_number_stops_the_run(run, monkeypatch):
    monkeypatch.setattr(Trainer, "prediction_step", lambda *_, **__: (torch.tensor(torch.nan), None, None))
    with pytest.raises(S2FTError, match="the loss is nan at step 4"):
        run()
