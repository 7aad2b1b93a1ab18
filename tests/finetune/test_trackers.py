"""Trackers through transformers: a stand-in gets what a run reports; real ones where they are installed."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from s2ft import S2FTError
from s2ft.finetune.options import parse_options
from s2ft.finetune.trackers import TRACKERS, check_trackers
from tiny_runs import train

pytestmark = pytest.mark.usefixtures("one_thread")

STAND_IN = """
import json
from types import SimpleNamespace

__version__ = "99"
context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
calls = []

class config(dict):
    def update(self, values, **_):
        super().update(values)

config = config()

def init(**how):
    if how["name"] == "refused":
        raise NotLoggedIn("no login\\nsee the docs")
    calls.append({"init": how["name"]})

def log(values, **how):
    calls.append({name: value for name, value in values.items() if isinstance(value, (int, float))})

def finish():
    calls.append({"finish": True})

class NotLoggedIn(Exception):
    pass
"""


@pytest.fixture
def run(base, data, tmp_path):
    def call(output: str = "out", **options):
        settings = {"max_steps": 3, "gradient_accumulation": 1, "learning_rate": 1e-2, "ratios": 0.25, "log_every": 1}
        settings |= {"model": base, "data": data, "precision": "fp32", "layout": "indexed"}
        return train(parse_options({**settings, "output": str(tmp_path / output), **options}))

    return call


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    """A module that stands in for trackio and remembers what it was told."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "trackio.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    before = sys.modules.pop("trackio", None)
    import trackio

    yield trackio
    sys.modules.pop("trackio")
    if before is not None:
        sys.modules["trackio"] = before


def test_a_tracker_gets_the_name_of_the_run_and_its_figures(run, trackio):
    card = run("my-run", report_to="trackio").card
    assert trackio.calls[0] == {"init": "my-run"}
    told = [call for call in trackio.calls if "train/loss" in call]
    assert [call["train/loss"] for call in told] == [loss for _, loss in card["loss_curve"]]
    assert trackio.config["learning_rate"] == 1e-2


def test_short_runs_that_look_for_a_rate_are_not_reported(run, trackio, monkeypatch):
    def search(options, short, trainer_of):
        assert trainer_of(options).args.report_to == []
        raise S2FTError("seen")

    monkeypatch.setattr("s2ft.finetune.prepare.search", search)
    with pytest.raises(S2FTError, match="seen"):
        run(report_to="trackio", learning_rate="auto", max_steps=200)


def test_what_a_tracker_itself_raises_names_it(run, trackio):
    with pytest.raises(S2FTError, match=r"^report_to='trackio' cannot be written to: no login$"):
        run("refused", report_to="trackio")


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr("s2ft.finetune.trackers.find_spec", lambda name: None)
    monkeypatch.setattr("s2ft.finetune.train.prepare", None)
    with pytest.raises(S2FTError, match=r"report_to='wandb' needs wandb, which is not installed: pip install wandb$"):
        run(report_to="wandb")
    with pytest.raises(S2FTError, match="2 problems"):
        check_trackers(["mlflow", "tensorboard"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [("tensorbord", "is unknown; choose from tensorboard"), ("none,wandb", "none stands alone"), (",", "must not be")],
)
def test_unknown_trackers_are_named(value, said):
    with pytest.raises(S2FTError, match=f"report_to={value!r}: .*{said}"):
        parse_options({"model": "m", "data": "d", "output": "o", "report_to": value})


def _tensorboard(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.glob("out/runs/*/events*")
    read = EventAccumulator(str(events)).Reload()
    return {name: [event.value for event in read.Scalars(name)] for name in ("train/loss", "train/learning_rate")}


def _mlflow(folder: Path) -> dict[str, list[float]]:
    import mlflow

    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert found.info.run_name == "out"
    history = {name: client.get_metric_history(found.info.run_id, name) for name in ("loss", "learning_rate")}
    return {f"train/{name}": [point.value for point in points] for name, points in history.items()}


def _trackio(folder: Path) -> dict[str, list[float]]:
    import sqlite3

    (file,) = folder.rglob("huggingface*.db")
    rows = sqlite3.connect(file).execute("select metrics from metrics order by step").fetchall()
    values = [json.loads(text) for (text,) in rows]
    return {name: [row[name] for row in values if name in row] for name in ("train/loss", "train/learning_rate")}


def _wandb(folder: Path) -> dict[str, list[float]]:
    (file,) = folder.rglob("*.wandb")
    assert b"train/loss" in file.read_bytes()
    return {}


READERS = {"tensorboard": _tensorboard, "mlflow": _mlflow, "trackio": _trackio, "wandb": _wandb}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_real_tracker_has_the_losses_of_the_card(run, tmp_path, monkeypatch, name):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: make test-trackers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    card = run(report_to=name).card
    found = READERS[name](tmp_path)
    if found:
        assert found["train/loss"] == pytest.approx([loss for _, loss in card["loss_curve"]], rel=1e-6)
        assert len(found["train/learning_rate"]) == len(card["loss_curve"])
