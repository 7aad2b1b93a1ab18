"""What base and result are asked after the training: a run that is stopped there goes on; a task may have no answer."""

import json

import pytest

from live import same
from llm_adapters import write_llm_adapters
from s2ft import S2FTError
from s2ft.evaluate.comparison import Scorer
from s2ft.evaluate.engines import TransformersEngine
from s2ft.finetune.options import parse_options
from s2ft.finetune.samples import Samples
from tiny_runs import train, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(base, data, tmp_path):
    def call(output: str, **options):
        settings = {"model": base, "data": data, "output": str(tmp_path / output), "learning_rate": 1e-2}
        settings |= {"max_steps": 4, "batch_size": 4, "precision": "fp32", "log_every": 1, "gradient_accumulation": 1}
        layout = {} if "method" in options else {"layout": "indexed"}  # layouts round differently, and time decides
        return train(parse_options({**settings, **layout, **options}))

    return call


@pytest.mark.parametrize(
    "more", [{}, {"method": "full"}, {"holdout": 8, "validate_every": 2}], ids=["s2ft", "full", "best"]
)
def test_a_run_that_is_stopped_while_it_asks_goes_on_to_the_same_result(run, tmp_path, monkeypatch, more):
    whole = run("whole", samples=2, **more)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Samples, "compare", stop)
        with pytest.raises(KeyboardInterrupt):
            run("stopped", samples=2, **more)
    card = json.loads((tmp_path / "stopped" / "run.json").read_text())
    assert card["status"] == "trained"
    assert "samples" not in card
    resumed = run("stopped", samples=2, resume=True, **more)
    assert resumed.card["status"] == whole.card["status"] == "finished"
    assert resumed.card["samples"] == whole.card["samples"]
    assert same(weights(resumed.output), weights(whole.output))
    with pytest.raises(S2FTError, match="holds a finished run"):
        run("stopped", samples=2, resume=True, **more)


def test_a_task_without_any_answer_has_a_row_that_says_so(run, tmp_path, monkeypatch):
    def lost(self, batch, *_):
        raise RuntimeError("CUDA out of memory")

    folder = write_llm_adapters(tmp_path / "questions", ["gsm8k"])
    monkeypatch.setattr(TransformersEngine, "_generate", lost)
    asked = {"evaluate": "gsm8k", "eval_data": str(folder), "eval_limit": 2}
    result = run("out", **asked)
    assert result.card["scores"]["gsm8k"]["tuned"] is None
    assert result.card["status"] == "finished"
    for name in ("README.md", "report.html"):
        assert "no answer" in (result.output / name).read_text()


def test_what_is_scored_is_scored_again_after_a_stop(run, tmp_path, monkeypatch):
    folder = write_llm_adapters(tmp_path / "questions", ["gsm8k"])
    asked = {"evaluate": "gsm8k", "eval_data": str(folder), "eval_limit": 3, "method": "full"}
    whole = run("whole", **asked)
    with monkeypatch.context() as patched:
        patched.setattr(Scorer, "compare", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("stopped", **asked)
    assert run("stopped", resume=True, **asked).card["scores"] == whole.card["scores"]
