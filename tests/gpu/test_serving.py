"""Adapters on a GPU: merged, switched, parked, pooled, mixed in one batch, saved and loaded again."""

import copy
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import s2ft
from live import layers, logits, same
from mixtures import mixture
from on_gpu import DEVICE, IS_CUDA, adapted, base_values, dense, error, random_tokens
from s2ft import S2FTConfig
from s2ft.layer import mixed
from s2ft.layer.pack import MixedBatch
from s2ft.tuner.pool import AdapterPool
from s2ft.tuner.switching import park

DTYPES = [torch.float32, torch.bfloat16]
NAMES = ["default", "a1", "a2"]
BASE = "__base__"
MOST = {torch.float64: 1e-5, torch.float32: 2e-4, torch.bfloat16: 0.08}  # float64: norms go through float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_merging_is_exact_and_undone_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model, ids = adapted(family, dtype, adapters=3).eval(), random_tokens(2, 9)
    before, expected = base_values(model), {name: dense(model, name)(ids.cpu()).logits for name in NAMES}
    for name in random.sample(NAMES, 3):
        model.set_adapter(name)
        model.merge_adapter()
        assert error(logits(model, ids), expected[name]) < MOST[dtype]
        model.unmerge_adapter()
        assert same(base_values(model), before)
    model.merge_adapter(random.sample(NAMES, 3))  # all, on top of each other
    model.unmerge_adapter()
    assert same(base_values(model), before)


@pytest.mark.parametrize("parked", [False, True], ids=["beside the model", "in the host's memory"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_switching_equals_merging_and_ends_in_the_base(dtype: torch.dtype, parked: bool) -> None:
    model, ids = adapted("llama", dtype, adapters=3).eval(), random_tokens(2, 9)
    before, expected = base_values(model), {}
    for name in NAMES:
        model.set_adapter(name)
        model.merge_adapter()
        expected[name] = logits(model, ids)
        model.unmerge_adapter()
    with model.disable_adapter():
        expected[None] = logits(model, ids)
    s2ft.switch(model, None)
    for name in NAMES if parked else []:
        park(model, name)
        blocks = [layer.block(name) for layer in layers(model)]
        assert all(block.weight.device.type == "cpu" and block.weight.is_pinned() == IS_CUDA for block in blocks)
    for name in random.choices([*NAMES, None], k=25):
        s2ft.switch(model, name)
        assert torch.equal(logits(model, ids), expected[name])
    s2ft.switch(model, None)
    assert same(base_values(model), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_saved_on_one_device_is_loaded_on_the_other_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model, ids = adapted("llama", dtype), random_tokens(2, 7)
    base = copy.deepcopy(model).unload().cpu()
    with s2ft.in_place(model):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        model.save_pretrained(tmp_path / "inside")
    model.save_pretrained(tmp_path / "outside")
    file = "adapter_model.safetensors"
    assert (tmp_path / "inside" / file).read_bytes() == (tmp_path / "outside" / file).read_bytes()
    assert s2ft.read_adapter(tmp_path / "outside").parameters == model.get_nb_trainable_parameters()[0]
    loaded = PeftModel.from_pretrained(base, tmp_path / "outside").eval()
    assert error(logits(loaded, ids.cpu()), logits(model.eval(), ids)) < MOST[dtype] / 2
    loaded.save_pretrained(tmp_path / "again")
    assert same(load_file(tmp_path / "again" / file), load_file(tmp_path / "outside" / file))
    back = PeftModel.from_pretrained(loaded.unload().to(DEVICE), tmp_path / "again").eval()
    assert torch.equal(logits(back, ids), logits(model, ids))


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that added mixed rows, in order."""
    calls: list[str] = []
    of_pack = mixed._of_pack

    def noted(*args: Any) -> Any:
        steps = of_pack(*args)
        calls.extend(add.__name__ for add, _, _ in steps)
        return steps

    monkeypatch.setattr(mixed, "_of_pack", noted)
    return calls


def by_itself(model: PeftModel, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Each row through a plain model with its own adapter's weights, in float64 on the CPU."""
    plain = {name: dense(model, name) for name in set(names)}
    return torch.cat([plain[name](ids[row : row + 1].cpu()).logits for row, name in enumerate(names)]).detach()


@pytest.mark.parametrize("length", [1, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_rows_of_a_mixed_batch_are_those_of_each_adapter(
    family: str, dtype: torch.dtype, length: int, kernel_calls: list[str]
) -> None:
    model, names = adapted(family, dtype, adapters=3).eval(), ["a2", BASE, "default", "a1", "a2", "a2", "default"]
    ids = random_tokens(len(names), length)
    found, expected = logits(model, ids, adapter_names=names), by_itself(model, ids, names)
    for row, name in enumerate(names):
        assert error(found[row], expected[row]) < MOST[dtype], name
    assert error(logits(model, ids, adapter_names=names[::-1])[1:2], expected[1:2]) > 2 * MOST[dtype]
    if IS_CUDA and dtype != torch.float64 and find_spec("triton"):
        assert set(kernel_calls) == {"add_by_kernel"}


def test_a_mixed_batch_generates_what_each_adapter_does(kernel_calls: list[str]) -> None:
    model, names = adapted("llama", torch.float32, adapters=3).eval(), ["a2", "default", BASE, "a1"]
    ids, options = random_tokens(4, 5), {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    mixed_rows = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        alone = dense(model, name).generate(input_ids=ids[row : row + 1].cpu(), **options)
        assert torch.equal(mixed_rows[row].cpu(), alone[0])
    if IS_CUDA and find_spec("triton"):
        assert set(kernel_calls) == {"add_by_kernel"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pool_brings_from_the_host_what_it_held_on_the_device(tmp_path: Path, dtype: torch.dtype) -> None:
    model, ids = adapted("llama", dtype, adapters=4).eval(), random_tokens(2, 6)
    model.save_pretrained(tmp_path)
    folders = {f"user {name}": tmp_path / name for name in ("a1", "a2", "a3")}
    expected = {name: logits(model, ids, adapter_names=[name.split()[1]] * 2) for name in folders}
    bytes_of_one = max((folder / "adapter_model.safetensors").stat().st_size for folder in folders.values())
    pool = AdapterPool(model, folders, device_bytes=2 * bytes_of_one, host_bytes=10 * bytes_of_one)
    for first, second in [random.sample(list(folders), 2) for _ in range(15)]:
        found = logits(model, ids, adapter_names=[first, second])
        assert error(found[0], expected[first][0]) < MOST[dtype] / 4
        assert error(found[1], expected[second][1]) < MOST[dtype] / 4
        assert pool.used()[0] <= 2 * bytes_of_one
    assert {one.weight.device.type for slices in pool._device.values() for one in slices.values()} == {DEVICE.type}
    kept = [one.weight for slices in pool._host.values() for one in slices.values()]
    assert kept
    assert all(weight.device.type == "cpu" and weight.is_pinned() == IS_CUDA for weight in kept)


def test_a_pool_brings_slices_of_experts_to_the_device(tmp_path: Path) -> None:
    base = mixture("mixtral", torch.float32)
    config = S2FTConfig(ratios=0.4, seed=0, init_weights=False, target_modules=["gate_up_proj", "down_proj"])
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "pooled")
    model = get_peft_model(base, S2FTConfig(ratios=0.2, target_modules=["down_proj"], seed=1)).to(DEVICE).eval()
    size = (tmp_path / "pooled" / "adapter_model.safetensors").stat().st_size
    AdapterPool(model, tmp_path, device_bytes=size, host_bytes=size)
    ids = random_tokens(2, 6)
    found = logits(model, ids, adapter_names=["pooled", BASE])
    model.load_adapter(tmp_path / "pooled", "loaded")
    assert error(found[:1], logits(model, ids[:1], adapter_names=["loaded"])) < MOST[torch.float32]
    assert error(found[1:], logits(model, ids[1:], adapter_names=[BASE])) < MOST[torch.float32]


@pytest.mark.parametrize("length", [1, 6, 40])
def test_gradients_through_a_mixed_batch(length: int) -> None:
    """By autograd, since the kernels have no backward: each row's adapter gets the gradient of its own dense weight."""
    model, names = adapted("llama", torch.float64, adapters=3), ["a1", "a2", "a1"]
    layer = layers(model)[3]
    x = torch.randn(3, length, layer.in_features, dtype=torch.float64, device=DEVICE, requires_grad=True)
    deltas = {name: layer.block(name).weight.requires_grad_() for name in set(names)}
    cotangent = torch.randn(3, length, layer.out_features, dtype=torch.float64, device=DEVICE)
    ours = torch.autograd.grad(layer(x, adapter_names=names), [x, *deltas.values()], cotangent)
    rows = []
    for row, name in enumerate(names):
        block, weight = layer.block(name), layer.base_layer.weight
        whole = weight.index_add(block.dim, block.indices, deltas[name])
        rows.append(torch.nn.functional.linear(x[row], whole, layer.base_layer.bias))
    expected = torch.autograd.grad(torch.stack(rows), [x, *deltas.values()], cotangent)
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.skipif(not (IS_CUDA and find_spec("triton")), reason="CUDA graphs need a GPU, and the kernels Triton")
@torch.no_grad()
def test_a_decoding_step_of_a_mixed_batch_is_captured_in_a_cuda_graph() -> None:
    model, batch = adapted("llama", torch.bfloat16, adapters=3).eval(), MixedBatch(["a1", BASE, "default", "a2"])
    for layer in layers(model)[:7]:
        x = torch.randn(4, 1, layer.in_features, dtype=torch.bfloat16, device=DEVICE)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles the kernels, and prepares the batch's tables
                layer(x, adapter_names=batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x, adapter_names=batch)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, layer(x, adapter_names=batch))
