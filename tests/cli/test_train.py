"""`s2ft train` as it is typed: exit codes, messages, precedence, Ctrl-C."""

import json
import os
import shlex
import signal
from functools import partial
from pathlib import Path

import pytest
import yaml

from commands import Command, wait_for
from s2ft.cli.train import _report
from s2ft.finetune.options import TrainOptions, parse_options
from s2ft.finetune.results import whole_command
from s2ft.finetune.trainer import Flow
from tiny_runs import interrupt_at

COMMON = ["--ratios", "0.25", "--precision", "fp32", "--gradient-accumulation", "1", "--log-every", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}+{a}=", "completion": str(2 * a)}) + "\n" for a in range(30)))
    return str(path)


@pytest.fixture
def train(s2ft):
    """`s2ft train` in this process."""
    return partial(s2ft, "train")


def test_a_run_from_the_command_line(train, base, data, tmp_path):
    out, result = tmp_path / "out", tmp_path / "result.json"
    words = ["--model", base, "--data", data, "--output", str(out), "--max-steps", "3", "--json", str(result)]
    code, printed, _ = train(*words, *COMMON)
    assert code == 0
    card = json.loads(result.read_text())
    assert card == json.loads((out / "run.json").read_text())
    assert card["training"]["steps"] == 3
    assert card["adapter"]["bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert "auto-detected" not in printed
    assert "fp32, as asked" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
        "loss.png", "report.html", "run.json", "run.md", "run.yaml",
    ]  # fmt: skip
    assert str(tmp_path) not in (out / "adapter_config.json").read_text().replace(base, "")


def test_the_summary_tells_what_was_asked_for_and_the_reasons(train, base, data, tmp_path):
    out = tmp_path / "out"
    words = ["--model", base, "--data", data, "--output", str(out), "--max-steps", "4", "--precision", "fp32"]
    code, printed, errors = train(
        *words, "--holdout", "3", "--validate-every", "1", "--strategy", "weight", "--ratios", "0.25"
    )
    assert code == 0, errors
    training = json.loads((out / "run.json").read_text())["training"]
    rows = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in printed.splitlines() if "  " in line}
    held_out = f"{training['best_loss']:.3f} at step {training['best_step']}, whose weights were kept (3 examples)"
    assert rows["held-out loss"] == held_out
    assert rows["memory"] == f"{training['peak_memory_bytes'] / 1e9:.2f} GB at most, of the process"
    assert 1e8 < training["peak_memory_bytes"] < 1e11  # bytes, not kilobytes
    assert "channels of the largest weight scores" in errors
    assert "seed None" not in errors
    assert "1 example a step: 4 steps, as asked" in errors
    assert f"learning rate: {training['learning_rate']:g}, for 4 steps of 1 example and" in errors


def test_scores_are_in_the_summary(capsys, tmp_path):
    training = {"final_loss": None, "tokens_per_second": 1.0, "steps": 1, "seconds": 1.0, "precision": "fp32"}
    scores = {"gsm8k": {"base": 0.1, "tuned": 0.25, "questions": 40}}
    _report({"adapter": {"bytes": 1, "share": 0.1}, "training": training, "scores": scores}, tmp_path, None)
    assert "gsm8k      10.0% → 25.0% of 40 questions" in capsys.readouterr().out


def test_flags_win_over_the_yaml_file(train, base, data, tmp_path):
    config = tmp_path / "run.yaml"
    settings = {"max_steps": 50, "ratios": {"o_proj": 0.5}, "batch_size": 2}
    config.write_text(yaml.safe_dump({"model": base, "data": data, "output": str(tmp_path / "out"), **settings}))
    assert train("--config", str(config), "--max-steps", "1", "--precision", "fp32")[0] == 0
    used = json.loads((tmp_path / "out" / "run.json").read_text())["options"]
    assert (used["max_steps"], used["batch_size"], used["ratios"]) == (1, 2, {"o_proj": 0.5})
    again = tmp_path / "out" / "run.yaml"
    assert train("--config", str(again), "--output", str(tmp_path / "again"))[0] == 0
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again")]
    assert adapters[0] == adapters[1]


SLICES = {
    "layers": [3],
    "ratios": {"o_proj": 0.1, "down_proj": 0.05},
    "target_modules": ["o_proj", "down_proj"],
    "packing": True,
    "learning_rate": "auto",
}
REWARDS = {"objective": "grpo", "reward_function": ["a b.py:f", "b.py:g"]}


@pytest.mark.parametrize("given", [SLICES, REWARDS, {**REWARDS, "reward_function": ["a.py:f"]}])
def test_the_command_in_the_card_gives_the_options_again(train, monkeypatch, given):
    given = {**given, "model": "org/base", "data": ["a b.json", "c.json"], "output": "out", "clip": 0.5}
    options, seen = parse_options({**given, "report_to": ["wandb", "mlflow"]}), []
    monkeypatch.setattr("s2ft.cli.train.check_run", lambda options: None)
    monkeypatch.setattr("s2ft.cli.train.check_hub", lambda name: None)
    monkeypatch.setattr("s2ft.cli.train._run", lambda options, _: seen.append(options))
    assert train(*shlex.split(whole_command(options))[2:])[0] == 0
    assert seen == [options]


def test_another_method_leaves_a_model_and_says_so(train, base, data, tmp_path):
    out = tmp_path / "out"
    words = ["--model", base, "--data", data, "--output", str(out), "--max-steps", "2", "--precision", "fp32"]
    code, printed, errors = train(*words, "--method", "lisa", "--lisa-layers", "1", "--gradient-accumulation", "1")
    assert code == 0, errors
    assert printed.split()[0] == "model"
    assert "training by LISA" in errors
    assert (out / "model.safetensors").is_file()
    assert (out / "tokenizer.json").is_file()
    again = tmp_path / "again"
    assert train("--config", str(out / "run.yaml"), "--output", str(again))[0] == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--model", "m", "--output", "o", "--method", "lora", "--ratios", "0.1", "--lisa-layers", "2"], [
            "2 problems", "--ratios='0.1' is no option of --method=lora; it belongs to s2ft", "--lisa-layers='2' is no option",
        ]),
        (["--epochs", "0", "--ratios", "o_proj=2,x_proj=.1", "--strategy", "best"], [
            "6 problems", "--model is missing", "--output is missing", "--epochs='0'",
            "--ratios['o_proj']=2.0 is outside (0, 1]",
            "'x_proj', which is unknown; choose from q_proj", "--strategy='best' is unknown; choose from random, weight",
        ]),
        (["--ratios", "lots"], ["--ratios='lots': must be a fraction such as 0.05, or one per projection"]),
        (["--no-such-flag"], ["No such option", "--no-such-flag"]),
        (["--config", "nowhere.yaml"], ["--config='nowhere.yaml' cannot be read"]),
        (["--model", "m", "--output", "o", "--json", "nowhere/r.json"], ["there is no folder 'nowhere'"]),
        (["--model", "m", "--output", "o", "--json", "."], ["--json='.' is a folder; name a file"]),
        (["--model", "./nowhere", "--output", "o"], ["--model='./nowhere' is not a folder"]),
    ],
)  # fmt: skip
def test_bad_input_exits_with_2_and_writes_nothing(train, data, tmp_path, monkeypatch, words, parts):
    monkeypatch.chdir(tmp_path)
    code, _, errors = train("--data", data, *words)
    assert code == 2
    assert "Traceback" not in errors
    for part in parts:
        assert part in errors
    assert list(tmp_path.iterdir()) == []


def test_the_help_shows_every_option_and_an_example(train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    code, printed, _ = train("--help")
    assert code == 0
    assert "Example: s2ft train --model" in printed
    for name in TrainOptions.model_fields:
        assert f"--{name.replace('_', '-')}" in printed


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_a_signal_to_end_saves_a_checkpoint_from_which_the_run_goes_on(base, data, tmp_path, number, name):
    out = tmp_path / "out"
    words = [
        "--model",
        base,
        "--data",
        data,
        "--output",
        str(out),
        "--max-steps",
        "100000",
        "--save-every",
        "5",
        *COMMON,
    ]
    command = Command(["train", *words], tmp_path / "log")
    wait_for(lambda: out.is_dir() and any(out.glob("checkpoint-*")), command)
    assert command.signal(number).wait() == 130, command.printed
    assert "Traceback" not in command.printed
    assert f"{name}: finishing this step" in command.printed
    assert "--resume" in command.printed
    card = json.loads((out / "run.json").read_text())
    assert card["status"] == "interrupted"
    checkpoint = out / f"checkpoint-{card['training']['steps']}"
    assert (checkpoint / "adapter_model.safetensors").read_bytes() == (out / "adapter_model.safetensors").read_bytes()
    assert not (checkpoint / "training_args.bin").exists()


def test_a_second_signal_ends_at_once_and_an_ignored_one_stays_ignored():
    def other(*_):
        raise ConnectionError

    before = [signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, other)]
    try:
        flow = Flow()
        with flow.listening():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as nohup sets it
            signal.raise_signal(signal.SIGINT)
            assert flow.interrupted
            with pytest.raises(ConnectionError):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is other
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def test_ctrl_c_before_the_first_step_leaves_nothing(train, base, data, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("s2ft.finetune.prepare.load_model", interrupt)
    code, _, errors = train("--model", base, "--data", data, "--output", str(tmp_path / "out"), *COMMON)
    assert code == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_tells_how_to_go_on(train, base, data, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2)
    code, printed, _ = train(
        "--model", base, "--data", data, "--output", str(tmp_path / "out"), "--max-steps", "4", *COMMON
    )
    assert code == 130
    assert "interrupted at step 2; go on with:" in printed


def test_the_real_arithmetic_set_runs_through(train, base, tmp_path):
    root = Path(os.environ.get("S2FT_DATA", Path(__file__).parents[3] / "shared" / "data"))
    source = root / "llm-adapters" / "ft-training_set" / "math_data.json"
    if not source.is_file():
        pytest.skip("the LLM-Adapters data is not here")
    words = ["--max-steps", "5", "--max-length", "400", "--learning-rate", "0.01", *COMMON]
    code, _, errors = train("--model", base, "--data", str(source), "--output", str(tmp_path / "out"), *words)
    assert code == 0
    assert "of 3260 examples have no response and are left out" in errors
    card = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (
        card["data"]["examples"] + card["data"]["without_response"] + card["data"]["response_beyond_max_length"] == 3260
    )
