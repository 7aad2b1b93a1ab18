"""`s2ft train` by FSDP2 and DeepSpeed ZeRO on two processes: what one process trains, also after a pause."""

import json
import os
import random
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from launching import ON_CPU
from s2ft import S2FTError
from s2ft.finetune.options import parse_options
from s2ft.finetune.resume import Paused, check_output
from s2ft.finetune.train import train
from s2ft.runtime.processes import engine, is_divided
from tiny_base import save_tiny_base
from tiny_runs import weights

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
ENGINES = {
    "fsdp2": FSDP,
    "fsdp2-sharded": {**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "fsdp2, loaded once": {**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    **{f"zero{stage}": {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (1, 2, 3)},
}
TWO = {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A step sees all examples: 2 processes × 4, or 1 × 8."""
    rng = random.Random(0)
    rows = [{"prompt": f"{index}+1=", "completion": "so many" * rng.randrange(1, 4)} for index in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    settings = {"model": str(save_tiny_base(tmp_path / "base")), "data": str(tmp_path / "data.json")}
    settings |= {"optim": "adamw_torch", "max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "precision": "fp32"}
    settings |= {"log_every": 1, "save_every": 2, "gradient_accumulation": 1}
    return settings | {"ratios": "o_proj=0.5,up_proj=0.2,down_proj=0.3", "output": str(tmp_path / "out")}


def launch(options: dict[str, Any], variables: dict[str, str], resume: bool = False) -> str:
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    module = "fsdp_on_cpu" if variables.get("ACCELERATE_USE_FSDP") else "s2ft.cli.app"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    on_cpu = ON_CPU if module == "fsdp_on_cpu" else {k: v for k, v in ON_CPU.items() if k != "ACCELERATE_USE_CPU"}
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launcher, "-m", module, "train", *words, *(["--resume"] if resume else [])],
        env={**os.environ, **on_cpu, **variables, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_two_processes_train_what_one_trains_and_go_on_after_a_pause(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    variables = ENGINES[name]
    launch(options, variables)
    one = {**options, "output": str(tmp_path / "one"), "batch_size": 8, "layout": "indexed"}
    train(parse_options(one))
    ours, expected = weights(tmp_path / "out"), weights(tmp_path / "one")
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (ours[key] - tensor).float().norm() <= 1e-5 * tensor.float().norm(), key
    card = json.loads((tmp_path / "out" / "run.json").read_text())
    assert card["training"]["engine"] == name.partition(",")[0]
    assert card["adapter"]["trainable_parameters"] == sum(t.numel() for t in expected.values() if t.is_floating_point())

    paused = {**options, "output": str(tmp_path / "paused"), "resume": True}
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "paused" / "checkpoint-2")
    for key, value in {**TWO, "ACCELERATE_USE_FSDP": "false"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(
        S2FTError, match=rf"engine: ddp here, but .*checkpoint-2 was made by {card['training']['engine']}"
    ):
        check_output(parse_options(paused)).check_same_run(parse_options(paused), card["data"]["digest"])
    launch({**options, "output": paused["output"]}, variables, resume=True)
    again = weights(tmp_path / "paused")
    assert all(torch.equal(again[key], tensor) for key, tensor in ours.items())


@pytest.mark.parametrize(
    ("variables", "name", "divided"),
    [
        ({}, "one process", False),
        (TWO, "ddp", False),
        ({**TWO, **FSDP}, "fsdp2", True),
        ({**TWO, **ENGINES["fsdp2-sharded"]}, "fsdp2-sharded", True),
        ({**TWO, **ENGINES["zero2"]}, "zero2", False),
        ({**TWO, **ENGINES["zero3"]}, "zero3", True),
    ],
)
def test_the_engine_is_read_off_the_launchers_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str, divided: bool
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert (engine(), is_divided()) == (name, divided)


def test_the_stage_of_a_deepspeed_config_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    for key, value in {**TWO, **ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json")}.items():
        monkeypatch.setenv(key, value)
    assert engine() == "zero3"


@pytest.mark.parametrize(
    ("variables", "noted", "message"),
    [
        ({}, {"processes": 2, "engine": "ddp"}, "processes: 1 here, but .*checkpoint-2 was made with 2"),
        ({**TWO, **FSDP}, {"processes": 4, "engine": "fsdp2"}, "processes: 2 here, but .* was made with 4"),
        ({**TWO, **FSDP}, {"processes": 2, "engine": "zero2"}, "engine: fsdp2 here, but .* was made by zero2"),
        ({**TWO, **FSDP}, {"processes": 2, "engine": "fsdp2-sharded"}, "engine: fsdp2 here, .* made by fsdp2-sharded"),
        ({**TWO, **ENGINES["zero3"]}, {"processes": 2}, "engine: zero3 here, but .* was made by ddp"),
    ],
)
def test_a_checkpoint_of_another_engine_or_of_more_processes_is_refused(
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    noted: dict[str, Any],
    message: str,
) -> None:
    checkpoint, parsed = tmp_path / "out" / "checkpoint-2", parse_options(options)
    checkpoint.mkdir(parents=True)
    note = {"options": parsed.model_dump(mode="json"), "data": {"digest": "digest"}, **noted}
    (checkpoint / "run.json").write_text(json.dumps(note))
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(S2FTError, match=message):
        Paused.read(checkpoint).check_same_run(parsed, "digest")


@pytest.mark.parametrize(
    ("variables", "given", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "FSDP's first version puts trained and frozen weights into one"),
        (
            {},
            {"method": "full", "ratios": ""},
            "method='full' trains the model's own weights, which s2ft train does not",
        ),
        ({}, {"layout": "in-place"}, "layout='in-place' needs whole weights, and fsdp2 leaves each process a part"),
        ({}, {"samples": 2}, "samples=2 needs whole weights"),
        ({}, {"quantize": "nf4"}, "quantize='nf4' needs whole weights"),
        ({}, {"learning_rate": "auto"}, "learning_rate='auto' trains several times"),
        ({}, {}, "accelerate turns on for accelerators only, and this process runs on cpu"),
        (
            ENGINES["zero2"] | {"ACCELERATE_USE_FSDP": "false"},
            {},
            "DeepSpeed, which is not installed: pip install deepspeed",
        ),
        (
            ENGINES["zero2"] | {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            {},
            "zero_stage=0 divides nothing",
        ),
    ],
)
def test_what_an_engine_cannot_do_is_refused(
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    given: dict[str, Any],
    message: str,
) -> None:
    if "not installed" in message and find_spec("deepspeed"):
        pytest.skip("DeepSpeed is installed")
    if torch.accelerator.is_available() and "accelerators only" in message:
        pytest.skip("there is an accelerator")
    for name, value in {**FSDP, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(S2FTError, match=message):
        train(parse_options({key: value for key, value in {**options, **given}.items() if value != ""}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "examples" / "distributed").glob("*.yaml")), ids=str
)
def test_the_ready_made_configs_are_accelerates(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    assert config.distributed_type in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    kinds = {"ddp": {}, "fsdp2": {"fsdp_version": 2}, "zero2": {"zero_stage": 2}, "zero3": {"zero_stage": 3}}
    given = {**config.to_dict().get("fsdp_config", {}), **config.to_dict().get("deepspeed_config", {})}
    assert kinds[path.stem].items() <= given.items()
