"""Channels that are exchanged during a run: which stop, that they keep their deltas, and that the rest trains by AdamW."""

from collections import defaultdict

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from live import same
from s2ft import S2FTError
from s2ft.finetune.options import parse_options
from s2ft.finetune.trainer import Flow
from tiny_runs import train

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, TURNS, RATE, BETAS = 9, (3, 6), 1e-2, (0.9, 0.95)
RATIOS = {"v_proj": 0.5, "o_proj": 0.25, "down_proj": 0.1}


@pytest.fixture
def run(base, data, tmp_path):
    def call(output: str = "out", **options):
        settings = {
            "max_steps": STEPS,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "learning_rate": RATE,
            "reselect": 2,
        }
        settings |= {"ratios": RATIOS, "warmup_steps": 0, "schedule": "constant", "precision": "fp32", "log_every": 1}
        return train(
            parse_options({"model": base, "data": data, "output": str(tmp_path / output), **settings, **options})
        )

    return call


@pytest.fixture
def watched(monkeypatch):
    """Name of a delta → its gradients before, and its values after, each step; all as [s, across]."""
    gradients, values = defaultdict(list), defaultdict(list)

    def before(self, args, state, control, model, **kwargs):
        for name, parameter in trained(model):
            gradients[name].append(by_channel(name, parameter.grad.cpu()).double())

    def after(self, args, state, control, model, **kwargs):
        for name, parameter in trained(model):
            values[name].append(by_channel(name, parameter.detach().cpu()).double())

    monkeypatch.setattr(Flow, "on_pre_optimizer_step", before)
    monkeypatch.setattr(Flow, "on_optimizer_step", after)
    return gradients, values


def trained(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def by_channel(name: str, delta: torch.Tensor) -> torch.Tensor:  # → [s, across], a copy
    return (delta.T if "o_proj" in name or "down_proj" in name else delta).clone()


@pytest.mark.parametrize("options", [{"layout": "in-place"}, {"layout": "indexed"}, {"precision": "pure-bf16"}])
def test_those_that_moved_least_stop_and_keep_their_deltas(run, watched, options):
    result = run(**options)
    assert result.card["adapter"]["trained_at_once"] == 2 * (8 + 8) * 32 + 13 * 32  # of v and o, of down
    for kind in ("v_proj", "o_proj", "down_proj"):
        gradients, values = (torch.cat([steps for _, steps in stacked(found, kind)], dim=1) for found in watched)
        trains = gradients.abs().sum(-1) > 0  # [steps, channels of all layers]
        assert len(set(trains.sum(-1).tolist())) == 1  # as many in every step
        for turn, last in zip(TURNS, (0, *TURNS), strict=False):
            old, new = trains[turn - 1], trains[turn]
            moves = (values[turn - 1] - (values[last - 1] if last else 0)).norm(dim=-1)
            assert 0 < (old & ~new).sum() == (new & ~old).sum()
            assert moves[old & ~new].max() <= moves[old & new].min() * (1 + 1e-5)
            assert (values[turn - 1][new & ~old] == 0).all()
            assert torch.equal(values[-1][old & ~new], values[turn - 1][old & ~new])
            assert (values[-1][old | new] != 0).any(-1).all()


def stacked(found, kind):
    return [(name, torch.stack(steps)) for name, steps in found.items() if kind in name]


@pytest.mark.parametrize("layout", ["in-place", "indexed"])
def test_what_trains_steps_by_adamw_and_starts_from_no_state(run, watched, layout):
    gradients, values = watched
    run(layout=layout)
    for name, found in gradients.items():
        delta = first = second = torch.zeros_like(found[0])
        for step, gradient in enumerate(found, start=1):
            trains = (gradient.abs().sum(-1) > 0)[:, None]
            first, second = first * trains, second * trains  # what stops loses its moments
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
            mean, spread = first / (1 - BETAS[0] ** step), (second / (1 - BETAS[1] ** step)).sqrt()
            delta = delta - RATE * mean / (spread + 1e-8)
            torch.testing.assert_close(values[name][step - 1], delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"budget": 0.03, "ratios": None, "strategy": "weight"}, {"holdout": 4, "validate_every": 1}]
)
def test_the_adapter_holds_all_that_ever_trained(run, base, options):
    result = run(**options)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.output)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, result.model.eval()(ids).logits)
    adapter = result.card["adapter"]
    assert 1.5 < adapter["trainable_parameters"] / adapter["trained_at_once"] < 2.5
    own = AutoModelForCausalLM.from_pretrained(base).state_dict()
    now = {name.replace(".base_layer", ""): value for name, value in result.model.get_base_model().state_dict().items()}
    assert same(own, {name: now[name] for name in own})


def test_what_would_move_what_has_stopped_is_refused(run):
    with pytest.raises(S2FTError) as caught:
        run(optim="sgd", weight_decay=0.1, resume=True)
    assert "reselect=2 does not go with optim='sgd'; take adamw_torch or adamw_torch_fused" in str(caught.value)
    assert "reselect=2 does not go with weight_decay=0.1; take 0" in str(caught.value)
    assert "reselect=2 does not go with resume: a checkpoint does not say which channels train" in str(caught.value)
    with pytest.raises(S2FTError, match=r"reselect=2 is too much for 1 steps; give at most half as many turns"):
        run(max_steps=1)
