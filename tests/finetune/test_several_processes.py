"""Two processes under accelerate's launcher: the weights of one process, one voice, and the same weights after a pause."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from launching import LAUNCH, ON_CPU
from s2ft import S2FTError
from s2ft.finetune.options import parse_options
from s2ft.finetune.train import train
from tiny_base import save_tiny_base
from tiny_runs import weights

LAUNCH += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
TRAINED, HELD_OUT = 8, 41  # the held-out ones are three batches, of which one process measures two
TWO = {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}  # what a launcher of two processes says to one


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A step sees all examples, so their order does not matter: 2 processes × 4, or 1 × 4 × 2."""
    rng = random.Random(0)
    rows = [
        {"prompt": f"{index}+1=", "completion": "so many" * rng.randrange(1, 4)} for index in range(TRAINED + HELD_OUT)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    settings = {"model": str(save_tiny_base(tmp_path / "base")), "data": str(tmp_path / "data.json"), "optim": "sgd"}
    settings |= {"max_steps": 4, "batch_size": 4, "learning_rate": 0.1, "precision": "fp32", "log_every": 1}
    return settings | {"holdout": HELD_OUT, "validate_every": 1, "gradient_accumulation": 1}


def launch(options: dict[str, Any], resume: bool = False) -> str:
    """Trains in two processes; returns what they print."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [*LAUNCH, "-m", "s2ft.cli.app", "train", *words, *(["--resume"] if resume else [])]
    done = subprocess.run(command, env={**os.environ, **ON_CPU}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "of_method",
    [
        pytest.param({"ratios": 0.25, "layout": "in-place"}, marks=pytest.mark.slow),
        pytest.param({"ratios": 0.25, "layout": "indexed", "strategy": "product"}, marks=pytest.mark.slow),
        pytest.param({"method": "full"}, marks=pytest.mark.slow),
        pytest.param({"method": "lisa", "lisa_layers": 1, "lisa_interval": 1}, marks=pytest.mark.slow),
    ],
    ids=["in place", "indexed", "full", "lisa"],
)
def test_two_processes_train_what_one_trains(
    options: dict[str, Any], tmp_path: Path, of_method: dict[str, Any]
) -> None:
    printed = launch({**options, **of_method, "output": str(tmp_path / "two")})
    one = train(parse_options({**options, **of_method, "output": str(tmp_path / "one"), "gradient_accumulation": 2}))
    ours, expected = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-7, msg=name)
    card = json.loads((tmp_path / "two" / "run.json").read_text())
    _check_card(card, one.card)
    assert printed.count("run card") == printed.count("precision: fp32") == printed.count("training by") == 1
    assert not (tmp_path / "two" / ".unfinished").exists()


def _check_card(card: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (card["training"]["processes"], card["data"]["examples"]) == (2, TRAINED)
    for name in ("steps", "planned_steps", "tokens", "warmup_steps", "held_out", "best_step"):
        assert card["training"][name] == expected["training"][name], name
    for name in ("loss_curve", "held_out_curve"):
        for (step, loss), (other_step, other_loss) in zip(card[name], expected[name], strict=True):
            assert step == other_step
            assert loss == pytest.approx(other_loss, rel=1e-5)


@pytest.mark.slow
def test_two_processes_go_on_to_the_same_weights(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"method": "lora", "lora_rank": 4, "optim": "adamw_torch"}  # with dropout
    launch({**options, "output": str(tmp_path / "whole")})
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "paused" / "checkpoint-3")
    with pytest.raises(S2FTError, match=r"processes: 1 here, but .*checkpoint-3 was made with 2"):
        train(parse_options({**options, "output": str(tmp_path / "paused"), "resume": True}))
    launch({**options, "output": str(tmp_path / "paused")}, resume=True)
    ours, expected = weights(tmp_path / "paused"), weights(tmp_path / "whole")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("variables", "given", "message"),
    [
        (TWO, {"evaluate": "gsm8k", "eval_data": "d"}, r"evaluate=\['gsm8k'\] needs one process, here are 2"),
        (TWO, {"precision": "pure-bf16"}, "precision='pure-bf16' rounds by chance"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM keeps parts of layers"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "a parallelism config .tensor, context, sequence. splits"),
    ],
)  # fmt: skip
def test_what_several_processes_cannot_do_is_refused(
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    given: dict[str, Any],
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(S2FTError, match=message):
        train(parse_options({**options, "output": str(tmp_path / "out"), **given}))
    assert not (tmp_path / "out").exists()
