"""The lean activations on a GPU, by own functions and by Liger's kernels, against the plain model in float64 on the CPU."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from families import build
from on_gpu import DEVICE, IS_CUDA, adapted, dense, dense_gradients, distance, error, random_tokens, slice_gradients
from s2ft import in_place
from s2ft.training import lean as module_under_test
from s2ft.training.lean import lean

NORMS = {"llama": 2, "qwen3": 4, "gemma3": 6, "phi3": 2}  # in a block
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["own", "liger"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Whose kernels run; says how often Liger's were called."""
    calls = []
    if request.param == "own":
        monkeypatch.setattr(module_under_test, "_has_liger", lambda: False)
        return lambda: len(calls)
    if not IS_CUDA:
        pytest.skip("Liger's kernels run on a GPU only")
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    for function in (LigerRMSNormFunction, LigerSiLUMulFunction):
        monkeypatch.setattr(function, "apply", _counted(function.apply, calls))
    return lambda: len(calls)


def _counted(apply: Any, calls: list[None]) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(None)
        return apply(*args)

    return counted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", NORMS)
def test_models_compute_the_same(family: str, dtype: torch.dtype, kernels: Any, request: pytest.FixtureRequest) -> None:
    model = build(family, dtype).to(DEVICE).requires_grad_(False)
    exact = copy.deepcopy(model).cpu().double()
    x = model.get_input_embeddings()(random_tokens(3, 9))
    results = []
    for run in (exact, model):
        patches = lean(model) if run is model else None
        inputs = x.to(run.device, run.dtype).requires_grad_()
        output = run(inputs_embeds=inputs).logits
        output.square().mean().backward()
        results.append((output, inputs.grad))
    assert len(patches.methods) == 3 * (NORMS[family] + 1) + 1  # every norm of a block, its MLP, and the last norm
    assert bool(kernels()) == ("liger" in request.node.callspec.id)
    patches.undo()
    for expected, ours in zip(*results, strict=True):
        assert error(ours, expected) < (2e-4 if dtype == torch.float32 else 0.08)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", NORMS)
def test_in_place_gradients_are_those_of_full_autograd(family: str, dtype: torch.dtype, kernels: Any) -> None:
    model, ids = adapted(family, dtype), random_tokens(3, 11)
    expected = dense_gradients(dense(model), model, ids)
    with in_place(model) as layout:
        assert layout.patches.methods
        ours = slice_gradients(model, ids)
    assert distance(ours, expected) < (2e-4 if dtype == torch.float32 else 0.08)
