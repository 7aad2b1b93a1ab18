"""The layout that a run trains in: asked for, or the faster; tried without a trace; kept when a run goes on."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from families import build, tokens
from quantised import stand_in
from s2ft import S2FTConfig, in_place
from s2ft.finetune import layout as module_under_test
from s2ft.finetune import trial
from s2ft.finetune.layout import Chosen, choose_layout
from s2ft.finetune.options import parse_options, read_config
from s2ft.finetune.trial import Batch
from tiny_base import save_tiny_base
from tiny_runs import train


def adapted(base: nn.Module | None = None) -> PeftModel:
    return get_peft_model(base or build("llama", torch.float32), S2FTConfig(ratios=0.25, init_weights=False))


def batch() -> dict[str, Tensor]:
    ids = tokens(2, 7)
    return {"input_ids": ids, "labels": ids}


def loss(model: nn.Module, given: Batch) -> Tensor:
    result: Tensor = model(**given).loss
    return result


def taking(monkeypatch: pytest.MonkeyPatch, in_place_ms: float, indexed_ms: float) -> list[str]:
    """Times are as given; returns the log of what was tried."""
    tried: list[str] = []
    real = trial.milliseconds

    def timed(run: Any, device: torch.device) -> float:
        real(run, device)
        tried.append("indexed" if len(tried) % 2 else "in place")
        return indexed_ms if tried[-1] == "indexed" else in_place_ms

    monkeypatch.setattr(trial, "milliseconds", timed)
    return tried


@pytest.mark.parametrize(
    ("in_place_ms", "indexed_ms", "expected"),
    [
        (5.0, 9.0, ("in-place", "in place: 5.0 ms forward and backward in place, 9.0 ms indexed")),
        (9.0, 9.0, ("in-place", "in place: 9.0 ms forward and backward in place, 9.0 ms indexed")),
        (9.0, 5.0, ("indexed", "indexed: 9.0 ms forward and backward in place, 5.0 ms indexed")),
    ],
)
def test_the_faster_is_taken(
    monkeypatch: pytest.MonkeyPatch, in_place_ms: float, indexed_ms: float, expected: Any
) -> None:
    tried = taking(monkeypatch, in_place_ms, indexed_ms)
    chosen = choose_layout(loss, adapted(), batch(), "auto")
    assert chosen[:2] == expected
    assert chosen.trial is not None
    assert chosen.trial.milliseconds == min(in_place_ms, indexed_ms)
    assert tried == ["in place", "indexed"] * 3


def test_trying_leaves_no_trace() -> None:
    model, given = adapted().eval(), batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert choose_layout(loss, model, given, "auto").layout in ("in-place", "indexed")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.training


@pytest.mark.parametrize("wanted", ["in-place", "indexed"])
def test_what_is_asked_for_is_tried_alone_and_only_for_the_estimate(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    tried = taking(monkeypatch, 5.0, 9.0)
    entered = []
    monkeypatch.setattr(module_under_test, "in_place", lambda model: entered.append(wanted) or in_place(model))
    chosen = choose_layout(loss, adapted(), batch(), wanted)
    assert chosen[:2] == (wanted, f"{wanted}, as asked")
    assert (len(tried), len(entered)) == (1, 2 * (wanted == "in-place"))


def test_weights_that_must_not_be_written_to_are_trained_around() -> None:
    base = build("llama", torch.float32)
    for block in base.model.layers[1:]:
        block.self_attn.o_proj, block.mlp.down_proj = (
            base.model.layers[0].self_attn.o_proj,
            base.model.layers[0].mlp.down_proj,
        )
        block.self_attn.o_proj.weight, block.mlp.down_proj.weight = (
            base.model.layers[0].self_attn.o_proj.weight,
            base.model.layers[0].mlp.down_proj.weight,
        )
    model = get_peft_model(base, S2FTConfig(ratios={"down_proj": 0.2}, layers=[0], init_weights=False))
    assert choose_layout(loss, model, batch(), "auto").layout == "indexed"


def test_on_a_quantised_base_in_place_saves_less_though_no_weight_is_written_to() -> None:
    model = get_peft_model(stand_in(build("llama", torch.float32)), S2FTConfig(ratios={"down_proj": 0.2}))
    chosen = choose_layout(loss, model, batch(), "auto")
    assert "ms forward and backward in place" in chosen.reason
    kept = [choose_layout(loss, model, batch(), name).trial.kept for name in ("in-place", "indexed")]
    assert kept[0] < kept[1]


def test_several_adapters_cannot_be_in_place() -> None:
    model = adapted()
    model.add_adapter("other", S2FTConfig(ratios=0.25, seed=4))
    model.base_model.set_adapter(["default", "other"])
    assert choose_layout(loss, model, batch(), "auto")[:2] == (
        "indexed",
        "indexed: in_place(model) trains one active adapter; active are: default, other",
    )


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    rng = random.Random(0)
    rows = [{"prompt": f"{rng.randrange(10)}+1=", "completion": "so many"} for _ in range(12)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    base = str(save_tiny_base(tmp_path / "base"))
    settings = {"max_steps": 4, "gradient_accumulation": 1, "ratios": 0.25, "save_every": 2, "precision": "fp32"}
    return {"model": base, "data": str(tmp_path / "data.json"), "output": str(tmp_path / "out"), **settings}


@pytest.mark.parametrize("taken", ["in-place", "indexed"])
def test_a_run_says_its_layout_and_goes_on_in_it(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    inside = []
    original = in_place

    def watched(model: nn.Module) -> Any:
        inside.append("in-place")
        return original(model)

    monkeypatch.setattr("s2ft.finetune.prepare.choose_layout", lambda *_: Chosen(taken, f"{taken}: measured", None))
    monkeypatch.setattr(module_under_test, "in_place", watched)
    card = train(parse_options(options)).card
    assert card["training"]["layout"] == f"{taken}: measured"
    assert inside == ["in-place"] * (taken == "in-place")
    output = Path(options["output"])
    assert json.loads((output / "checkpoint-2" / "run.json").read_text())["options"]["layout"] == taken
    assert read_config(str(output / "run.yaml"))["layout"] == taken
    (output / "run.json").unlink()
    asked = []
    monkeypatch.setattr(
        "s2ft.finetune.prepare.choose_layout", lambda *given: asked.append(given[-1]) or Chosen(taken, "measured", None)
    )
    resumed = train(parse_options({**options, "resume": True})).card
    assert asked == [taken]  # not "auto": the other one is not tried again
    assert resumed["training"]["layout"] == f"{taken}, as the checkpoint's run"
