"""Training with S²FT in the usual loops: Trainer, gradient checkpointing, accumulation, clipping, autocast, torch.compile."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from families import build, tokens
from s2ft import S2FTConfig, in_place
from s2ft.format.slices import Slice
from s2ft.layer.linear import S2FTLinear

BOTH_SIDES = {"q_proj": 0.5, "v_proj": 0.5, "o_proj": 0.5, "up_proj": 0.2, "down_proj": 0.2}


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    config = S2FTConfig(**{"ratios": BOTH_SIDES, "init_weights": False, "task_type": "CAUSAL_LM", **options})
    return get_peft_model(build("llama", dtype), config)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()
    return gradients(model)


def deltas(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def random_rows() -> Dataset:
    return Dataset.from_dict({"input_ids": tokens(8, 6).tolist(), "labels": tokens(8, 6).tolist()})


def train(
    model: nn.Module,
    folder: Path,
    rows: Dataset | None = None,
    resume_from_checkpoint: str | None = None,
    **options: Any,
) -> Trainer:
    rows = rows or random_rows()
    arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no", **options}
    settings = TrainingArguments(
        output_dir=str(folder), learning_rate=0.1, disable_tqdm=True, use_cpu=True, **arguments
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


class TestTrainer:
    @pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
    def test_changes_the_deltas_and_nothing_else(self, checkpointing: bool | None, tmp_path: Path) -> None:
        model = adapted()
        before = copy.deepcopy(model.state_dict())
        options: dict[str, Any] = {"weight_decay": 0.5, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
        if checkpointing is not None:
            options |= {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing},
            }
        train(model, tmp_path, **options)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) == (not name.endswith("s2ft_block.default.weight")), name

    @pytest.mark.parametrize("layout", [nullcontext, in_place])
    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self, layout: Any, tmp_path: Path) -> None:
        whole = adapted()
        again = copy.deepcopy(whole)
        rows, settings = random_rows(), {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        for model, options in ((whole, {}), (again, {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")})):
            with layout(model):
                train(model, tmp_path, rows, **settings, **options)
        for name, value in deltas(whole).items():
            assert torch.equal(value, deltas(again)[name]), name

    @pytest.mark.parametrize("layout", [nullcontext, in_place])
    def test_the_best_checkpoint_is_loaded_at_the_end(self, layout: Any, tmp_path: Path) -> None:
        """The best is said to be the highest loss, so it is not the last."""
        model, ids = adapted(), tokens(8, 6)
        losses = {
            "metric_for_best_model": "eval_loss",
            "greater_is_better": True,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        with layout(model):
            trainer = train(model, tmp_path, max_steps=3, load_best_model_at_end=True, **losses)
            found = trainer.evaluate()["eval_loss"]
        history = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row][:3]
        assert found == pytest.approx(max(history), rel=1e-5)
        assert history[-1] < max(history)
        with torch.no_grad():
            assert model.eval()(input_ids=ids, labels=ids).loss.isfinite()

    def test_a_checkpoint_holds_the_deltas(self, tmp_path: Path) -> None:
        model = adapted()
        base = copy.deepcopy(model.get_base_model())
        train(model, tmp_path, save_strategy="steps", save_steps=2)
        checkpoint = tmp_path / "checkpoint-2"
        assert (checkpoint / "adapter_model.safetensors").exists()
        loaded = PeftModel.from_pretrained(unadapted(base), checkpoint)
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name


def unadapted(model: nn.Module) -> nn.Module:
    """The base model below a copy's adapters."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, S2FTLinear):
                setattr(parent, name, child.base_layer)
    return model


class TestGradients:
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_changes_no_gradient(self, reentrant: bool) -> None:
        model, ids = adapted(torch.float64).train(), tokens(2, 6)
        expected = backward(model, ids)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = backward(model, ids)
        assert expected
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)

    def test_accumulation_sums_and_clipping_scales(self) -> None:
        model, first, second = adapted(torch.float64), tokens(1, 6), tokens(1, 6)
        total = {name: backward(model, first)[name] + backward(model, second)[name] for name in backward(model, first)}
        model.zero_grad(set_to_none=True)
        for ids in (first, second):
            model(input_ids=ids, labels=ids).loss.backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, total[name])
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        torch.testing.assert_close(norm, torch.cat([g.flatten() for g in total.values()]).norm())

    def test_autocast(self) -> None:
        model, ids = adapted(), tokens(2, 6)
        expected = backward(model, ids)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(input_ids=ids).logits.dtype == torch.bfloat16
            model.zero_grad(set_to_none=True)
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found = gradients(model)
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        for name, gradient in expected.items():
            assert nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.98, name


class TestCompile:
    @pytest.mark.parametrize("chosen", ["in 1,5-7,15", "out 0,5-7,11"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_layer_without_graph_breaks(self, chosen: str, dtype: torch.dtype) -> None:
        torch.compiler.reset()
        layer = S2FTLinear(nn.Linear(16, 12).to(dtype), "a", Slice.parse(chosen), init_weights=False)
        x = torch.randn(2, 3, 16, dtype=dtype, requires_grad=True)
        results = []
        for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            y = call(x)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, layer.s2ft_block["a"].weight))))
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, **tolerance)

    def test_model_without_graph_breaks(self) -> None:
        torch.compiler.reset()
        base, ids = build("llama", torch.float64), tokens(2, 6)
        base.model.layers = base.model.layers[:1]
        model = get_peft_model(base, S2FTConfig(ratios=BOTH_SIDES, init_weights=False)).eval()
        expected, loss = backward(model, ids), model(input_ids=ids, labels=ids).loss
        model.zero_grad(set_to_none=True)
        compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
        found = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        found.backward()
        torch.testing.assert_close(found, loss)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name])
