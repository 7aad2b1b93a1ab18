"""The support table: a random family of transformers is as it says, and the page is what the measured file says."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from s2ft import S2FTError
from s2ft.lab.bench import families
from s2ft.lab.bench.families import bench_families, families_line, row_of
from s2ft.lab.families import check as module_under_test
from s2ft.lab.families.check import check
from s2ft.lab.families.page import page_of
from s2ft.lab.families.tiny import KINDS, classes, tiny

ROOT = Path(__file__).parents[2]
REPORT = json.loads((ROOT / "results" / "families.json").read_text(encoding="utf-8"))
SMALL = [row for row in REPORT["rows"] if row.get("exact") and row["parameters"] < 300_000]
IS_SAME = REPORT["settings"]["transformers"] == transformers.__version__


def test_the_page_is_what_was_measured() -> None:
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == page_of(REPORT)


@pytest.mark.skipif(not IS_SAME, reason=f"the table is of transformers {REPORT['settings']['transformers']}")
def test_the_table_has_every_class_of_this_version() -> None:
    listed = {(row["kind"], row["model_type"], row["class"]) for row in REPORT["rows"]}
    assert listed == {(kind, name, of) for kind in KINDS for name, of in classes(kind).items()}


def test_nothing_that_runs_is_inexact_and_most_causal_models_have_heads() -> None:
    run = [row for row in REPORT["rows"] if "exact" in row]
    assert all(row["exact"] for row in run)
    assert sum(row["heads"] for row in run if row["kind"] == "causal") >= 150


def test_a_random_family_of_transformers_trains_saves_reloads_and_merges_exactly() -> None:
    """Two of them, by the seed of the test."""
    for number in torch.randint(len(SMALL), (2,)).tolist():
        written, seed = SMALL[number], int(torch.randint(2**31, ()))
        row = row_of(written["kind"], written["model_type"], written["class"], seed)
        assert row.get("exact"), row
        if IS_SAME and written["experts"] is not True:  # True: measured before experts were trained
            for name in ("projections", "heads", "experts", "slices", "lora", "llama_cpp"):
                assert row[name] == written[name], row


def test_drawn_families_train_as_full_autograd_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a few that are quick; `make test-slow` draws from all."""
    quick = {"causal": {"gpt_neox": "GPTNeoXForCausalLM", "olmoe": "OlmoeForCausalLM", "phi3": "Phi3ForCausalLM"}}
    monkeypatch.setattr("s2ft.lab.bench.families.classes", lambda kind: quick.get(kind, {}))
    (row,) = bench_families(drawn=1, seed=int(torch.randint(2**31, ()))).rows
    assert row["exact"], row
    assert row["trained_error"] < 1e-5
    with pytest.raises(S2FTError, match="drawn=4 must be from 1 to 3"):
        bench_families(drawn=4)
    with pytest.raises(S2FTError, match=r"page='p.md' needs all classes; leave out drawn=1"):
        bench_families(drawn=1, page="p.md")


@pytest.mark.slow
def test_random_families_of_all_train_as_full_autograd_does() -> None:
    rows = bench_families(drawn=12, seed=int(torch.randint(2**31, ()))).rows
    assert all(row["exact"] for row in rows if "exact" in row), rows


def test_a_wrong_gradient_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module_under_test._block_gradients

    def wrong(*args: object) -> dict[str, torch.Tensor]:
        return {path: gradient * (1 + 1e-6) for path, gradient in right(*args).items()}

    model = tiny("gpt_neox", "GPTNeoXForCausalLM")
    assert check(model).is_exact
    monkeypatch.setattr(module_under_test, "_block_gradients", wrong)
    assert not check(model).is_exact
    monkeypatch.setattr(module_under_test, "_block_gradients", lambda *args: _with_nan_last(right(*args)))
    assert not check(model).is_exact


def _with_nan_last(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    *_, last = gradients
    return {**gradients, last: gradients[last] * torch.nan}


@pytest.mark.parametrize("where", ["page", "kept"])
def test_files_that_cannot_be_written_are_said_before_the_work(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "row_of", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(S2FTError, match="nowhere"):
        bench_families("encoder", **{where: str(tmp_path / "nowhere" / "file")})


def test_what_cannot_be_built_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2ft.lab.families.tiny.MOST_PARAMETERS", 10)
    row = row_of("causal", "llama", "LlamaForCausalLM")
    assert row["problem"].startswith("S2FTError: LlamaForCausalLM has ")
    assert families_line(row)["exact"] == "not run"


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(S2FTError, match="kind='casual' is unknown; choose from causal, seq2seq"):
        bench_families("casual")


def test_a_page_of_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2ft.lab.bench.families.classes", lambda kind: {"bert": "BertForMaskedLM"})
    report = bench_families("encoder", page=str(tmp_path / "page.md"))
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text == page_of(report.as_dict())
    assert "| `bert` | up down q k v o | yes | yes | 12 of 12 | – | yes | – |" in text


def test_rows_that_ran_are_kept_and_others_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"bert": "BertForMaskedLM", "nothing": "NoSuchModel"}
    monkeypatch.setattr("s2ft.lab.bench.families.classes", lambda kind: two)
    kept = tmp_path / "rows.jsonl"
    first = bench_families("encoder", kept=str(kept)).rows
    asked: list[str] = []

    def again(kind: str, model_type: str, *rest: object, **options: object) -> dict[str, object]:
        asked.append(model_type)
        return {"kind": kind, "model_type": model_type, "class": rest[0], "problem": "again"}

    monkeypatch.setattr("s2ft.lab.bench.families.row_of", again)
    second = bench_families("encoder", kept=str(kept)).rows
    assert asked == ["nothing"]
    assert second == [first[0], {**first[1], "problem": "again"}]
    bench_families("encoder", seed=1, kept=str(kept))  # of other settings, nothing is taken
    assert asked == ["nothing", "bert", "nothing"]
    kept.write_text("{}", encoding="utf-8")
    with pytest.raises(S2FTError, match=r"rows.jsonl:1: is no row of this benchmark"):
        bench_families("encoder", kept=str(kept))


def test_layers_that_share_a_weight_are_compared_one_by_one() -> None:
    """Zamba runs one attention block from several layers."""
    model = tiny("zamba", "ZambaForCausalLM")
    paths = [f"model.layers.{layer}.shared_transf.feed_forward.down_proj" for layer in (1, 3)]
    first, second = (model.get_submodule(path) for path in paths)
    assert first.weight is second.weight
    module_under_test.untied(model, paths)
    assert first.weight is not second.weight
    assert torch.equal(first.weight, second.weight)
