"""The server under the lm-evaluation-harness's local-completions model, where lm-eval[api] is installed."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from live_server import live
from s2ft.demo import base_path
from s2ft.demo.skills import SKILLS

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("tenacity", reason="the harness asks servers with what lm-eval[api] brings")

TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 10, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def tasks(folder: Path) -> list[dict[str, Any]]:
    """Words to be reversed, which the base can do: among three, and written."""
    rows = []
    for example in SKILLS["reverse"].examples(10, seed=4):
        word = example["completion"]
        wrong = ["".join(random.sample(word, len(word))) + letter for letter in "xy"]
        rows.append({"question": example["prompt"], "answer": word, "choices": [word, *wrong]})
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    text = {"doc_to_text": "{{question}}", "target_delimiter": ""}
    return [{"task": name, **data, **text, **settings} for name, settings in TASKS.items()]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("as_tokens", [True, False])
def test_it_scores_by_likelihood_and_by_what_is_written(tmp_path: Path, as_tokens: bool) -> None:
    with live(None) as server:
        settings = {
            "base_url": f"{server.url}/v1/completions",
            "model": "base",
            "tokenizer": str(base_path()),
            "tokenized_requests": as_tokens,
            "num_concurrent": 4,
            "max_length": 512,
        }
        found = lm_eval.simple_evaluate("local-completions", model_args=settings, tasks=tasks(tmp_path))
    assert found["results"]["choice"]["acc,none"] >= 0.9
    assert found["results"]["writing"]["exact_match,none"] >= 0.9
