"""Objectives beside supervised fine-tuning: what TRL's trainers compute with slices, in both layouts, and what runs leave."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

from live import same
from s2ft import S2FTError
from s2ft.finetune.layout import layout
from s2ft.finetune.objectives import OBJECTIVES
from s2ft.finetune.options import parse_options, read_config
from s2ft.finetune.prepare import prepare
from s2ft.layer.linear import sliced_layers
from tiny_runs import interrupt_at, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = ("dpo",)
LAYOUTS = ("in-place", "indexed")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of 24 records of each kind, no two alike."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("objectives")
    asked = [f"{n}+{rng.randrange(10)}=" for n in range(24)]
    records = {
        "pair": [
            {"prompt": one, "chosen": f"{rng.randrange(20)}", "rejected": f"{rng.randrange(99)}, no"} for one in asked
        ],
    }
    records["judged"] = [{"prompt": one, "completion": "x", "label": n % 2 == 0} for n, one in enumerate(asked)]
    records["prompt"] = [{"prompt": one} for one in asked]
    paths = {kind: folder / f"{kind}.json" for kind in records}
    for kind, path in paths.items():
        path.write_text(json.dumps(records[kind]))
    return {kind: str(path) for kind, path in paths.items()}


@pytest.fixture
def run(base, files, tmp_path):
    """Six short steps of an objective, unless told otherwise."""

    def call(objective: str, output: str = "out", **options: Any):
        settings = {"max_steps": 6, "batch_size": 4, "gradient_accumulation": 2, "learning_rate": 1e-2, "ratios": 0.25}
        settings |= {
            "precision": "fp32",
            "layout": "in-place",
            "log_every": 1,
            "data": files.get(OBJECTIVES[objective].kind),
        }
        settings |= {"model": base, "output": str(tmp_path / output), "objective": objective}
        return train(parse_options({**settings, **options}))

    return call


@pytest.mark.parametrize("objective", OBJECTIVES.keys() - {"sft"})
def test_a_run_lowers_the_loss_and_says_what_it_was(objective, run):
    result = run(objective)
    curve = [loss for _, loss in result.card["loss_curve"]]
    assert len(curve) == 6
    assert curve[-1] < curve[0]
    assert result.card["options"]["objective"] == objective
    assert result.card["data"]["examples"] == 24
    for name in OBJECTIVES[objective].measures:
        assert result.card["objective"][name] is not None
    assert read_config(str(result.output / "run.yaml"))["objective"] == objective
    assert OBJECTIVES[objective].title in (result.output / "README.md").read_text()


@pytest.mark.parametrize("objective", OBJECTIVES.keys() - {"sft"})
def test_a_resumed_run_ends_in_the_same_weights(objective, run, monkeypatch):
    whole = run(objective, "whole", max_steps=4)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        assert run(objective, "parts", max_steps=4).interrupted
    resumed = run(objective, "parts", max_steps=4, resume=True)
    assert same(weights(whole.output), weights(resumed.output))


def log_probabilities(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the answer of each row, by plain torch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (picked * batch["completion_mask"][:, 1:]).sum(1)


def moved(trainer: Any) -> None:
    """Deltas as after some training."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)


def plain_copies(trainer: Any, base: str, folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The base, and the policy with its deltas in its weights: plain models, read from files, in float64."""
    trainer.model.save_pretrained(folder)
    frozen, policy = (AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64) for _ in range(2))
    return frozen, PeftModel.from_pretrained(policy, folder).merge_and_unload().requires_grad_(True)


@pytest.fixture
def trainer(base, files, tmp_path):
    """The trainer of an objective, ready to run, with deltas that have moved."""

    def make(objective: str, **options: Any) -> Any:
        settings = {"model": base, "data": files[OBJECTIVES[objective].kind], "output": str(tmp_path / "out")}
        settings |= {"batch_size": 4, "learning_rate": 1e-3, "ratios": 0.3, "precision": "fp32", "layout": "indexed"}
        made = prepare(parse_options({**settings, "objective": objective, **options})).trainer
        moved(made)
        return made

    return make


def check_gradients(trainer: Any, policy: torch.nn.Module, loss: torch.Tensor) -> None:
    """Those of the slices are the channels of full autograd's."""
    loss.backward()
    for path, layer in sliced_layers(trainer.model, "default").items():
        block = layer.block("default")
        full = policy.get_submodule(path.removeprefix("base_model.model.")).weight.grad
        expected = full.index_select(block.dim, block.indices).float()
        torch.testing.assert_close(block.weight.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_the_reference_of_dpo_is_the_base_and_gradients_are_full_autograds(layout_name, trainer, base, tmp_path):
    dpo = trainer("dpo", beta=0.3)
    frozen, policy = plain_copies(dpo, base, tmp_path / "moved")
    batch = next(iter(dpo.get_train_dataloader()))
    with layout(dpo.model, layout_name) as entered:
        assert layout_name == "indexed" or {place.how for place in entered.placements} == {"contiguous"}
        theirs = torch.cat(dpo.compute_ref_log_probs(dpo.model, batch))
        loss = dpo.loss_of(dpo.model, batch)
        loss.backward()
        assert not any(dpo._metrics["train"].values())  # trying a batch leaves no trace in what is logged
    with torch.no_grad():
        reference = log_probabilities(frozen, batch)
    torch.testing.assert_close(theirs.double(), reference, rtol=1e-5, atol=1e-4)
    ratios = log_probabilities(policy, batch) - reference
    better, worse = ratios.chunk(2)
    assert ratios.abs().max() > 0.05  # the deltas show
    expected = -F.logsigmoid(0.3 * (better - worse)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    check_gradients(dpo, policy, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ppo"}, "objective='ppo': unknown; choose from sft, dpo"),
        ({"objective": "dpo", "packing": True}, "packing=True is no option of objective=dpo; it belongs to sft"),
        ({"beta": 0.1}, "beta=0.1 is no option of objective=sft; it belongs to dpo"),
        ({"objective": "dpo", "beta": -1}, "beta=-1: input should be greater than or equal to 0"),
        (
            {"objective": "dpo", "method": "full"},
            "method='full' trains the base itself, which objective='dpo' needs as its",
        ),
    ],
)
def test_what_an_objective_does_not_go_with_is_refused(options, message):
    with pytest.raises(S2FTError, match=message):
        parse_options({"model": "m", "data": "d", "output": "o", **options})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_data_without_the_fields_is_refused_before_anything_is_loaded_or_written(
    objective, run, files, tmp_path, monkeypatch
):
    monkeypatch.setattr("s2ft.finetune.prepare.load_model", lambda *_: pytest.fail("the model was loaded"))
    wrong = next(file for kind, file in files.items() if kind not in {OBJECTIVES[objective].kind, "answer"})
    with pytest.raises(S2FTError, match=r"expected .*; found prompt"):
        run(objective, data=wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_share_of_the_rate_is_that_of_trls_own_defaults(objective):
    default = {
        name: row.trainer_class().config_class("o", bf16=False).learning_rate for name, row in OBJECTIVES.items()
    }
    assert OBJECTIVES[objective].rate == pytest.approx(min(1, default[objective] / default["sft"]))


def test_held_out_pairs_choose_the_weights(run):
    result = run("dpo", holdout=5, validate_every=2, max_steps=4)
    curve = dict(result.card["held_out_curve"])
    assert curve.keys() == {2, 4}
    assert result.card["training"]["best_loss"] == min(curve.values())
    assert result.card["data"]["examples"] == 19
