"""The study on real text, tiny: on files made here, and on the real ones where they are."""

import os
from pathlib import Path

import pytest
import torch

from llm_adapters import write_llm_adapters
from s2ft import S2FTError
from s2ft.data.tokens import IGNORED
from s2ft.lab.study import commonsense
from s2ft.lab.study.commonsense import ASKED, MAJORITY, CommonsenseSettings, load_material, majority, study_commonsense
from s2ft.lab.study.contenders import Contender
from s2ft.lab.study.report import LOSS
from s2ft.lab.study.training import Workload, base_tokenizer, fresh_base, response_loss, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")

REAL = Path(os.environ.get("S2FT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "llm-adapters"
TINY = CommonsenseSettings(
    seeds=2,
    contenders=(Contender("s2ft 4%", "s2ft", 0.04),),
    rates={"s2ft": (1e-3,)},
    workload=Workload(steps=2, batch_size=4, train_examples=8, test_examples=3),
)


@pytest.fixture
def data(tmp_path):
    tasks = {task for tasks in ASKED.values() for task in tasks} | set(commonsense.TRAINED)
    return write_llm_adapters(tmp_path / "data", tasks)


def test_rows_of_every_contender_and_the_floor(data, tmp_path):
    told: list[float] = []
    report = study_commonsense(tmp_path / "runs", TINY, told.append, data=data)
    asked = {task for tasks in ASKED.values() for task in tasks}
    by_method = {
        m: {row["task"] for row in report.rows if row["method"] == m} for m in (MAJORITY, "vanilla", "s2ft 4%")
    }
    assert by_method == {
        MAJORITY: asked,
        "vanilla": {*asked, *ASKED, "old"},
        "s2ft 4%": {*asked, *ASKED, "old", LOSS},
    }
    old = [row["score"] for row in report.rows if (row["method"], row["task"]) == ("vanilla", "old")]
    assert min(old) > 0.8
    assert told[-1] == 1
    assert study_commonsense(tmp_path / "runs", TINY, data=data).rows == report.rows
    assert list(report.table()[0])[1:] == ["boolq", "obqa", "arc-e", "siqa", "winogrande", "old", LOSS]


def test_majority_is_the_share_of_the_most_frequent_answer(data):
    assert majority(load_material(data, 3).checked)["boolq"] == pytest.approx(2 / 3)


def test_tuning_and_training_share_no_example(data):
    material = load_material(data, 3)
    sides = [{example["prompt"] for example in material.draw(split, 1000, 0)} for split in ("fit", "validation")]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]
    assert all(" train " in prompt for side in sides for prompt in side)


def test_response_loss_is_the_mean_over_response_tokens():
    tokens = tokens_of([{"prompt": "a: ", "completion": "b"}, {"prompt": "c", "completion": "longer one"}])
    model, losses = fresh_base().double().eval(), []
    for row in tokens:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses += [
            -float(scores[at, label].detach()) for at, label in enumerate(labels[1:].tolist()) if label != IGNORED
        ]
    expected = sum(losses) / len(losses)
    assert len(losses) == len("b") + len("longer one") + 2  # each with its end
    assert response_loss(fresh_base(), tokens, 2) == pytest.approx(expected, rel=1e-4)
    assert base_tokenizer().eos_token_id == tokens[0]["input_ids"][-1]


def test_missing_files_are_named_before_anything_is_run(data, tmp_path):
    (Path(data) / "dataset" / "ARC-Challenge" / "train.json").unlink()
    with pytest.raises(S2FTError, match=r"no examples to train arc-c on: there is no .*ARC-Challenge/train\.json"):
        study_commonsense(tmp_path / "runs", TINY, data=data)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
def test_the_real_files_are_read():
    material = load_material(str(REAL), 100)
    assert 15_000 < len(material.examples) < 17_400  # of 17,754: long passages are left out
    shares = majority(material.checked)
    assert 0.5 <= shares["boolq"] < 0.8
    assert 0.3 < shares["siqa"] < 0.5
