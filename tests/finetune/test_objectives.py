"""Objectives beside supervised fine-tuning: what TRL's trainers compute with slices, in both layouts, and what runs leave."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BlenderbotConfig

from live import same
from s2ft import S2FTError
from s2ft.finetune.layout import layout
from s2ft.finetune.objectives import OBJECTIVES
from s2ft.finetune.options import parse_options, read_config
from s2ft.finetune.prepare import prepare
from s2ft.finetune.recipe import settle_batch
from s2ft.finetune.resume import Note
from s2ft.finetune.reward_functions import load_reward
from s2ft.finetune.trainers import other_prompts
from s2ft.layer.linear import sliced_layers
from s2ft.runtime.models import load_scorer
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
    records["judged"] = [{"prompt": one, "completion": f"{n * 7}", "label": n % 2 == 0} for n, one in enumerate(asked)]
    records["prompt"] = [{"prompt": one, "labels": [n]} for n, one in enumerate(asked)]  # a field like any other
    records["wrong"] = [{"question": one} for one in asked]
    for record in records["pair"]:
        record["chosen"] += " yes"
    paths = {kind: folder / f"{kind}.json" for kind in records}
    for kind, path in paths.items():
        path.write_text(json.dumps(records[kind]))
    return {kind: str(path) for kind, path in paths.items()}


def grpo(folder: Path) -> dict[str, Any]:
    """Rewards answers for their vowels, which a random model learns to write."""
    path = folder / "rewards.py"
    path.write_text(
        "def vowels(prompts, completions, **_):\n    return [sum(map(text.count, 'aeiou')) for text in completions]\n"
    )
    return {"reward_function": f"{path}:vowels", "generations": 4, "completion_length": 6, "beta": 0.1}


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
        settings |= grpo(tmp_path) if objective == "grpo" and "reward_function" not in options else {}
        given = {name: value for name, value in {**settings, **options}.items() if value is not None}
        return train(parse_options(given))

    return call


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "sft"])
def test_a_run_lowers_the_loss_and_says_what_it_was(objective, run):
    result = run(objective)
    curve = [loss for _, loss in result.card["loss_curve"]]
    assert len(curve) == 6
    assert objective in ("grpo", "kto") or curve[-1] < curve[0]
    assert all(tensor.any() for name, tensor in weights(result.output).items() if name.endswith("weight"))
    assert result.card["options"]["objective"] == objective
    assert result.card["data"]["examples"] == 24
    for name in OBJECTIVES[objective].measures:
        assert result.card["objective"][name] is not None
    assert read_config(str(result.output / "run.yaml"))["objective"] == objective
    assert OBJECTIVES[objective].title in (result.output / "README.md").read_text()


def test_a_reward_function_that_is_edited_while_the_run_goes_on_is_not_resumed(run, tmp_path, monkeypatch):
    write = Note.write

    def edited(note: Note, checkpoint: Path, seconds: float) -> None:
        with (tmp_path / "rewards.py").open("a") as file:
            file.write("# edited")
        write(note, checkpoint, seconds)

    monkeypatch.setattr(Note, "write", edited)
    interrupt_at(monkeypatch, 1)
    rewards = grpo(tmp_path)
    assert run("grpo", limit=4, max_steps=2, **rewards).interrupted
    with pytest.raises(S2FTError, match=r"reward_function=.* has changed since .*checkpoint-1 was made"):
        run("grpo", limit=4, max_steps=2, resume=True, **rewards)


def test_an_edited_reward_function_is_not_resumed(run, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 1)
    assert run("grpo", limit=4, max_steps=2).interrupted
    rewards = {
        "reward_function": f"{tmp_path / 'rewards.py'}:vowels",
        "generations": 4,
        "completion_length": 6,
        "beta": 0.1,
    }
    with (tmp_path / "rewards.py").open("a") as file:
        file.write("# edited")
    with pytest.raises(S2FTError, match=r"reward_function=.* has changed since .*checkpoint-1 was made"):
        run("grpo", limit=4, max_steps=2, resume=True, **rewards)


def test_several_reward_functions_are_added_up_and_may_have_nothing_to_say(run, tmp_path):
    file = tmp_path / "several.py"
    file.write_text(
        "def one(prompts, completions, **_):\n    return [1.0 for _ in completions]\n"
        "def some(prompts, completions, **_):\n    return [None if n % 2 else 2.0 for n in range(len(completions))]\n"
    )
    options = {"generations": 4, "completion_length": 2, "beta": 0.1, "limit": 4, "max_steps": 1}
    result = run("grpo", reward_function=[f"{file}:one", f"{file}:some"], **options)
    assert result.card["objective"]["reward"] == pytest.approx(2), "1 and 3 in turns"


SLOW = {"kto", "orpo", "reward"}


@pytest.mark.parametrize(
    "objective", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in OBJECTIVES if name != "sft"]
)
def test_a_resumed_run_ends_in_the_same_weights(objective, run, monkeypatch):
    few = {"max_steps": 4, "limit": 4 if objective == "grpo" else 16}  # two steps an epoch
    whole = run(objective, "whole", **few)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        assert run(objective, "parts", **few).interrupted
    resumed = run(objective, "parts", resume=True, **few)
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


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_the_reference_of_kto_is_the_base(layout_name, trainer, base, tmp_path):
    kto = trainer("kto", beta=0.2)
    frozen, policy = plain_copies(kto, base, tmp_path / "moved")
    batch = next(iter(kto.get_train_dataloader()))
    others = {name: batch[f"KL_{name}"] for name in ("input_ids", "attention_mask", "completion_mask")}
    assert not torch.equal(others["input_ids"], batch["input_ids"])
    with layout(kto.model, layout_name):
        theirs = kto.compute_ref_log_probs(kto.model, batch)
        loss = kto.loss_of(kto.model, batch)
        loss.backward()
    with torch.no_grad():
        reference, of_others = log_probabilities(frozen, batch), log_probabilities(frozen, others)
        divergence = (log_probabilities(policy, others) - of_others).mean().clamp(min=0)
    torch.testing.assert_close(theirs[0].double(), reference, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(theirs[1].double(), of_others, rtol=1e-5, atol=1e-4)
    ratios = log_probabilities(policy, batch) - reference
    good = torch.as_tensor(batch["label"])
    losses = 1 - torch.sigmoid(0.2 * torch.where(good, ratios - divergence, divergence - ratios))
    torch.testing.assert_close(loss.double(), losses.mean(), rtol=1e-4, atol=1e-5)
    check_gradients(kto, policy, losses.mean())


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_orpo_learns_the_better_answer_and_its_odds(layout_name, trainer, base, tmp_path):
    orpo = trainer("orpo", beta=0.2)
    _, policy = plain_copies(orpo, base, tmp_path / "moved")
    batch = next(iter(orpo.get_train_dataloader()))
    with layout(orpo.model, layout_name):
        loss = orpo.loss_of(orpo.model, batch)
        loss.backward()
    means = []
    for name in ("chosen", "rejected"):
        ids, labels = batch[f"{name}_input_ids"], batch[f"{name}_labels"]
        row = {"input_ids": ids, "attention_mask": batch[f"{name}_attention_mask"], "completion_mask": labels != -100}
        means.append(log_probabilities(policy, row) / (labels[:, 1:] != -100).sum(1))
    seen = batch["chosen_attention_mask"][:, 1:]
    whole = {**row, "input_ids": batch["chosen_input_ids"], "attention_mask": batch["chosen_attention_mask"]}
    whole["completion_mask"] = batch["chosen_attention_mask"]
    likelihood = -log_probabilities(policy, whole).sum() / seen.sum()
    odds = [mean - torch.log1p(-mean.exp()) for mean in means]
    expected = likelihood - 0.2 * F.logsigmoid(odds[0] - odds[1]).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    check_gradients(orpo, policy, expected)


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_the_head_of_a_reward_model_is_trained_and_comes_back(layout_name, run, base, files):
    result = run("reward", layout=layout_name, max_steps=3)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain.config.pad_token_id = 0
    loaded = PeftModel.from_pretrained(plain, result.output).eval()
    (head,) = (tensor for name, tensor in weights(result.output).items() if "score" in name)
    assert torch.equal(head, result.model.get_base_model().score.modules_to_save["default"].weight)
    ids = torch.randint(3, 250, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.model.eval()(ids).logits)
    readme = (result.output / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)" in readme
    assert "pipeline_tag: text-classification" in readme


@pytest.mark.parametrize(
    "options",
    [
        {"method": "full"},
        {"method": "paca", "paca_rank": 2},
        {"method": "peft:lora", "peft_config": {"r": 2}},
    ],
    ids=lambda options: options["method"],
)
def test_other_methods_make_reward_models_too(options, run, base):
    result = run("reward", max_steps=2, ratios=None, layout=None, **options)
    source = str(result.output) if options["method"] == "full" else base
    loaded = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    if options["method"] != "full":
        loaded = PeftModel.from_pretrained(loaded, result.output)
        assert not any("score" in name for name in getattr(loaded.peft_config["default"], "slices", None) or ())
    loaded.get_submodule("base_model.model" if source == base else "").config.pad_token_id = 0
    ids = torch.randint(3, 250, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, result.model.eval()(ids).logits)


def test_the_divergence_of_kto_is_measured_on_answers_to_other_prompts(base, files, tmp_path):
    """A pair becomes two rows side by side; the answer of one tells nothing about the divergence on the other's prompt."""
    for kind, size in itertools.product(("pair", "judged"), (2, 3, 4)):
        options = {"model": base, "data": files[kind], "output": str(tmp_path / "out"), "objective": "kto"}
        setup = prepare(
            parse_options({**options, "ratios": 0.25, "batch_size": size, "max_steps": 1, "learning_rate": 1})
        )
        rows = setup.trainer.train_dataset
        own = {(tuple(row["prompt_ids"]), tuple(row["completion_ids"])) for row in rows}
        assert not any((tuple(row["prompt_ids"]), tuple(row["KL_completion_ids"])) in own for row in rows)


def test_answers_to_other_prompts_are_found_in_linear_time():
    prompts = [random.choice("ab") for _ in range(50)]
    for size in (2, 3, 8):
        found = other_prompts(prompts, size)
        assert all(prompts[other] != prompts[row] for row, other in enumerate(found))
    same = other_prompts(["a"] * 10**5, 4)  # quadratic, this would take minutes
    assert same[:5] == [3, 0, 1, 2, 7]
    assert other_prompts([*["a"] * 10**5, "b"], 4)[:3] == [10**5] * 3


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_grpo_holds_on_to_the_base(layout_name, trainer, base, tmp_path):
    """The reference log-probabilities of sampled answers are the frozen copy's."""
    made = trainer("grpo", **grpo(tmp_path))
    frozen, _ = plain_copies(made, base, tmp_path / "moved")
    with layout(made.model, layout_name):
        inputs = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    answers = inputs["completion_ids"]
    ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = frozen(ids, attention_mask=mask, position_ids=positions).logits[:, -answers.shape[1] - 1 : -1]
    expected = logits.log_softmax(-1).gather(2, answers[..., None])[..., 0]
    written = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["ref_per_token_logps"].double()[written], expected[written], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ppo"}, "objective='ppo': unknown; choose from sft, dpo, kto, orpo, grpo, reward"),
        ({"objective": "kto", "batch_size": 1}, "batch_size=1: objective='kto' compares the examples of a batch"),
        ({"objective": "grpo"}, "reward_function is missing: What grpo rewards: FILE.py:function"),
        (
            {"objective": "grpo", "reward_function": "r.py:f", "holdout": 3},
            "holdout=3: the loss of objective='grpo' does not",
        ),
        (
            {"objective": "reward", "evaluate": "gsm8k", "eval_data": "d"},
            "evaluate=.*'reward' scores answers and gives none",
        ),
        ({"objective": "dpo", "reward_function": "r.py:f"}, "reward_function='r.py:f' is no option of objective=dpo"),
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
    with pytest.raises(S2FTError, match=r"wrong.json:1: expected .*; found question"):
        run(objective, data=files["wrong"])
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


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "rewards.py", "reward_function='.*rewards.py' must be FILE.py:function"),
        (None, "rewards.py:f", "rewards.py cannot be read: .*No such file"),
        ("def g(**_): ...", "rewards.py:f", "rewards.py defines no function f; it has g"),
        ("def f(**_): oh no", "rewards.py:f", "rewards.py cannot be read: invalid syntax"),
    ],
)
def test_a_reward_function_that_is_not_there_is_named_before_anything_runs(text, name, message, run, tmp_path):
    if text is not None:
        (tmp_path / "rewards.py").write_text(text)
    with pytest.raises(S2FTError, match=message):
        run("grpo", reward_function=str(tmp_path / name))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "f' returned .1.0.; it must return 3 numbers"),
        ("return ['a', 'b', 'c']", "f' returned .'a', 'b', 'c'.; it must return 3 numbers"),
        ("return 1 / 0", "f' raised ZeroDivisionError: division by zero"),
        ("return [len(text) for text in completions]", None),
        ("return [0, None, 2]", None),
    ],
)
def test_what_a_reward_function_returns_is_checked(body, message, tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(f"def f(prompts, completions, **fields):\n    {body}\n")
    function, asked = (
        load_reward(f"{path}:f"),
        {"prompts": ["p"] * 3, "completions": ["", "a", "bb"], "answer": [1, 2, 3]},
    )
    if message is None:
        assert function(**asked) == [0, None if "None" in body else 1, 2]
        assert function.__name__ == "f"
    else:
        with pytest.raises(S2FTError, match=message):
            function(**asked)


def test_a_field_that_trl_keeps_for_itself_is_refused_where_it_is_wanted(run, files, tmp_path):
    record = {"prompt": "1+1=", "completion": "2"}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    (tmp_path / "rewards.py").write_text(
        "def f(prompts, completions, completion, **_):\n    return [0.0] * len(prompts)\n"
    )
    given = {"data": str(tmp_path / "data.json"), "reward_function": f"{tmp_path / 'rewards.py'}:f"}
    with pytest.raises(
        S2FTError, match="wants the field completion, which TRL keeps for itself; call it otherwise: map="
    ):
        run("grpo", **given)
    (tmp_path / "data.json").write_text(json.dumps([{"prompt": "1+1=", "completions": "2"}]))
    with pytest.raises(S2FTError, match="the field completions cannot be passed to a reward function"):
        run("grpo", **given)
    assert not (tmp_path / "out").exists()


def test_a_step_holds_all_answers_to_a_prompt(files, tmp_path):
    given = {
        "model": "m",
        "data": files["prompt"],
        "output": "o",
        "objective": "grpo",
        **grpo(tmp_path),
        "generations": 6,
    }
    options = parse_options(given)
    settled = settle_batch(options, 6 * 24).options
    assert (settled.batch_size * settled.gradient_accumulation) % 6 == 0
    with pytest.raises(S2FTError, match=r"a step has 4 rows .*, which is no multiple of generations=6"):
        settle_batch(options.model_copy(update={"batch_size": 4, "gradient_accumulation": 1}), 6 * 24)


def test_a_strategy_that_needs_answers_is_refused_without_them(run):
    with pytest.raises(
        S2FTError, match="strategy='gradient' runs the model on answers to learn, and objective='reward' has"
    ):
        run("reward", strategy="gradient")


def test_a_model_without_a_head_for_scores_is_named(files, tmp_path):
    config = BlenderbotConfig(vocab_size=258, d_model=8, encoder_layers=1, decoder_layers=1)
    config.save_pretrained(tmp_path)
    with pytest.raises(S2FTError, match="is a Blenderbot, for which transformers has no model with a score head"):
        load_scorer(str(tmp_path), torch.float32)
