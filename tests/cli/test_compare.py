"""`s2ft compare` as it is typed: runs that are there, and runs that it trains, one for each method."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

from s2ft import S2FTError
from s2ft.cli.app import main
from s2ft.data.examples import data_digest
from s2ft.finetune import contest
from s2ft.finetune.lora import equal_rank, lora_config
from s2ft.finetune.options import parse_options
from s2ft.finetune.prepare import read_examples
from s2ft.finetune.reward_functions import rewards_digest
from s2ft.runtime.models import empty_model
from tiny_base import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = [
    "--max-steps",
    "3",
    "--gradient-accumulation",
    "1",
    "--log-every",
    "1",
    "--precision",
    "fp32",
    "--holdout",
    "4",
]


@pytest.fixture
def trained(monkeypatch) -> list[list[str]]:
    """The commands that would run in processes of their own, and run in this one."""
    commands: list[list[str]] = []

    def in_this_process(words: list[str]) -> int:
        commands.append(words[3:])
        before, sys.argv = sys.argv, ["s2ft", *words[3:]]
        try:
            main()
        except SystemExit as left:
            return int(left.code or 0)
        finally:
            sys.argv = before
        raise AssertionError

    monkeypatch.setattr(contest, "exit_code", in_this_process)
    return commands


def test_an_interrupted_comparison_says_how_it_goes_on_and_a_failed_run_is_named(
    s2ft, base, data, tmp_path, monkeypatch
):
    codes = iter((130, 2, 2))
    monkeypatch.setattr(contest, "exit_code", lambda words: next(codes))
    words = ["compare", "--methods", "full,lora", "--model", base, "--data", data, "--output", str(tmp_path / "out")]
    code, printed, _ = s2ft(*words)
    assert (code, printed) == (130, "the same command goes on from here\n")
    code, _, errors = s2ft(*words)
    assert code == 2
    assert "not trained, as said above: full, lora" in errors


def test_a_run_that_is_interrupted_has_the_time_to_save_its_checkpoint():
    """Ctrl-C reaches both processes of a terminal; the run takes a second to end, with its own exit code."""
    child = (
        "import signal, sys, time\n"
        "def save(*_): time.sleep(1); print('saved', flush=True); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save); print('ready', flush=True); time.sleep(60)"
    )
    words = (
        f"import sys; from s2ft.finetune.contest import exit_code; print(exit_code([sys.executable, '-c', {child!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", words], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout.readline() == "ready\n"
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.communicate(timeout=60)[0] == "saved\n130\n"


def test_what_is_finished_is_kept_and_the_page_has_all(s2ft, trained, base, data, tmp_path):
    out, rows = tmp_path / "out", tmp_path / "rows.json"
    words = ["compare", "--methods", "s2ft,lora,peft:miss", "--budget", "0.06", "--model", base, "--data", data]
    words += ["--output", str(out), "--json", str(rows), "--learning-rate", "0.01", *SHORT]
    code, printed, errors = s2ft(*words)
    assert code == 0, errors
    found = {row["run"]: row for row in json.loads(rows.read_text())}
    assert list(found) == ["s2ft", "lora", "peft-miss"]
    assert all(0.03 < row["share"] < 0.09 for row in found.values())
    assert all(row["held_out_loss"] is not None for row in found.values())
    assert "not alike" not in printed
    assert (out / "comparison.html").read_text().count('r="6"') == 9
    rank = equal_rank(empty_model(base), round(0.06 * empty_model(base).num_parameters()))
    assert json.loads((out / "lora" / "run.json").read_text())["options"]["lora_rank"] == rank
    assert len(trained) == 3
    code, _, errors = s2ft(*words)
    assert code == 0, errors
    assert len(trained) == 3  # nothing was trained again
    code, _, errors = s2ft(*words, "--epochs", "7")
    assert code == 2
    assert re.search(r"--epochs=7\.0, but \S+ was trained with --epochs=3\.0; name another output", errors)
    free = [word for word in words if word not in ("--learning-rate", "0.01")]
    code, _, errors = s2ft(*free)
    assert code == 2, "the rate that was given then is left open now"
    assert re.search(r"--learning-rate='auto', but \S+ was trained with --learning-rate=0\.01; name another", errors)
    shorter = [word for word in words if word not in ("--holdout", SHORT[SHORT.index("--holdout") + 1])]
    code, _, errors = s2ft(*shorter)
    assert code == 2
    assert re.search(r"--holdout=None, but \S+ was trained with --holdout=", errors)
    kept = Path(data).read_text()
    Path(data).write_text(json.dumps([{"prompt": "7+8=", "completion": "15"}, *json.loads(kept)]))
    code, _, errors = s2ft(*words)
    Path(data).write_text(kept)
    assert code == 2
    assert re.search(r"--data=.* has changed since \S+ was trained; name another output", errors), errors
    fewer = [word for at, word in enumerate(words) if "--gradient-accumulation" not in words[at - 1 : at + 1]]
    code, _, errors = s2ft(*fewer)
    assert code == 2, "one of the two that make a step"
    assert re.search(r"--gradient-accumulation=None, but \S+ was trained with --gradient-accumulation=1", errors)
    code, _, errors = s2ft(*words, "--samples", "2")
    assert code == 2
    assert re.search(r"--samples=2, but \S+ was asked with --samples=0; name another output", errors), errors
    code, printed, _ = s2ft("compare", str(out / "s2ft"), str(out / "lora"), "--html", str(tmp_path / "two.html"))
    assert code == 0
    assert re.search(r"lora\s.*\d\.\d\d GB", printed)
    assert (tmp_path / "two.html").is_file()


def test_each_method_gets_the_options_that_it_takes_and_looks_for_its_own_rate(base, data):
    values = {"model": base, "data": [data], "output": "o", "lora_rank": "4", "strategy": "random", "epochs": "2"}
    runs = contest.plan(["s2ft", "lora", "full", "peft:oft"], values)
    assert [run.learning_rate for run in runs] == ["auto", "auto", None, "auto"]
    assert [run.strategy for run in runs] == ["random", None, None, None]
    assert runs[1].lora_rank == 4
    assert {run.epochs for run in runs} == {2.0}
    assert runs[3].output == "o/peft-oft"


def test_a_budget_keeps_what_is_given_or_refuses_it(base, data):
    values = {"model": base, "data": [data], "output": "o", "budget": "0.05", "target_modules": "o_proj,down_proj"}
    s2ft, lora = contest.plan(["s2ft", "lora"], values)
    assert s2ft.target_modules == lora.target_modules == ["o_proj", "down_proj"]
    model = empty_model(base)
    wanted = 0.05 * model.num_parameters()
    trained = [
        sum(
            p.numel()
            for p in get_peft_model(tiny_model(), lora_config(rank, 1, targets=lora.target_modules)).parameters()
            if p.requires_grad
        )
        for rank in range(1, 40)
    ]
    assert lora.lora_rank == 1 + min(range(39), key=lambda place: abs(trained[place] - wanted))
    for name, value in (("lora_rank", "3"), ("lora_alpha", "5")):
        with pytest.raises(S2FTError, match=rf"{name}={value}: with budget=0.05, lora gets {name}=\d+; leave one"):
            contest.plan(["s2ft", "lora"], {**values, name: value})


def test_runs_are_not_uploaded_one_over_the_other(base, data):
    values = {"model": base, "data": [data], "output": "o", "push_to_hub": "me/x"}
    with pytest.raises(S2FTError, match="push_to_hub='me/x': each run would be uploaded over the one before"):
        contest.plan(["s2ft", "lora"], values)


@pytest.mark.slow
def test_each_run_has_a_process_of_its_own(s2ft, base, data, tmp_path):
    words = ["compare", "--methods", "s2ft,lora", "--model", base, "--data", data, "--output", str(tmp_path / "out")]
    code, printed, errors = s2ft(*words, "--learning-rate", "0.01", *SHORT)
    assert code == 0, errors
    assert re.search(r"s2ft\s.*\d\.\d\d GB", printed)


def test_a_finished_run_of_an_edited_reward_function_is_refused_and_one_whose_data_is_away_is_kept(
    base, tmp_path, caplog
):
    data, rewards, folder = (tmp_path / name for name in ("data.json", "rewards.py", "out"))
    data.write_text('[{"prompt": "1+1="}]')
    rewards.write_text("def f(prompts, completions, **_):\n    return [0.0] * len(prompts)\n")
    given = {"model": base, "data": str(data), "output": str(folder), "objective": "grpo", "learning_rate": 1e-3}
    options = parse_options({**given, "reward_function": f"{rewards}:f"})
    card = {"status": "finished", "options": options.model_dump(mode="json"), "given": ["learning_rate"]}
    card |= {
        "data": {"digest": data_digest(read_examples(options))},
        "rewards": rewards_digest(options.reward_function),
    }
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(card))
    assert contest.standing(options) == "finished"
    data.rename(tmp_path / "away.json")
    assert contest.standing(options) == "finished"
    assert "has changed is not known" in caplog.text
    (tmp_path / "away.json").rename(data)
    with rewards.open("a") as file:
        file.write("# edited")
    with pytest.raises(S2FTError, match=r"reward_function=.* has changed since \S+ was trained; name another output"):
        contest.standing(options)


def test_a_paused_run_goes_on(base, data, tmp_path, monkeypatch):
    options = parse_options({"model": base, "data": data, "output": str(tmp_path / "out"), "layers": [1]})
    started = []
    monkeypatch.setattr(contest, "exit_code", lambda words: started.append(words) or 0)
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-2" / "run.json").write_text("{}")
    assert contest.standing(options) == "paused"
    assert contest.run(options) == 0
    assert started[0][-1] == "--resume"
    assert started[0][0] == sys.executable


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "runs: name at least two folders, or methods to train"),
        (["a"], "name at least two folders"),
        (["a", "b", "--epochs", "2"], "epochs: without methods, runs are compared as they are"),
        (["a", "--methods", "lora"], "compare them with 'a' afterwards"),
        (["a", "b"], "'a' holds no run.json"),
        (["--methods", "lora,lora"], "names lora more than once"),
        (["--methods", "lora,peft:nope"], "none of PEFT's methods"),
        (["--methods", "lora,dora", "--budget", "1%"], "--budget='1%'"),
        (["--methods", "lora,dora", "--budget", "5"], r"--budget=5\.0 is outside"),
        (["--methods", "lora", "--lisa-layers", "2"], "lisa-layers='2' is an option of none"),
        (["a", "b", "--html", "x.htm"], "must end in .html"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(s2ft, trained, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.json").write_text('[{"prompt": "1", "completion": "2"}]')
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    words = [*words, *(["--model", "m", "--data", "d.json", "--output", "o"] if words[:1] == ["--methods"] else [])]
    code, _, errors = s2ft("compare", *words)
    assert code == 2
    assert re.search(said, errors), errors
    assert trained == []
