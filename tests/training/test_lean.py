"""The lean activations against autograd in float64, against the modules they stand for, and in what they keep."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import FalconMambaConfig, FalconMambaForCausalLM, LlamaConfig, LlamaForCausalLM

from families import build, tokens
from mixtures import mixture
from s2ft.runtime.memory import own_tensors, saved_bytes
from s2ft.training.lean import NORM_KINDS, GatedActivation, RMSNorm, lean

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def plain_norm(x: Tensor, weight: Tensor, eps: float, late: bool) -> Tensor:
    normed = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return normed * (1 + weight) if late else weight * normed


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activation_has_the_gradients_of_full_autograd(name: str) -> None:
    gate, up = (torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(GatedActivation.apply(gate, up, name), ACTIVATIONS[name](gate) * up)
    assert torch.autograd.gradcheck(lambda g, u: GatedActivation.apply(g, u, name), (gate, up))


@pytest.mark.parametrize("kind", NORM_KINDS)
def test_norm_has_the_gradients_of_full_autograd(kind: str) -> None:
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(RMSNorm.apply(x, weight, 1e-3, kind), plain_norm(x, weight, 1e-3, kind == "gemma"))
    assert torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-3, kind), (x, weight))


def kept_bytes(run: Any, *given: Tensor) -> int:
    """Bytes of distinct storages that backward keeps, the given tensors left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(size for pointer, size in found.items() if pointer not in known)


def test_nothing_is_kept_but_the_inputs_and_a_number_a_row() -> None:
    gate, up = (torch.randn(6, 40, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    assert kept_bytes(lambda: GatedActivation.apply(gate, up, "silu"), gate, up) == 0
    assert kept_bytes(lambda: F.silu(gate) * up, gate, up) == 6 * 40 * 2
    x, weight = torch.randn(6, 40, dtype=torch.bfloat16, requires_grad=True), torch.ones(40, dtype=torch.bfloat16)
    assert kept_bytes(lambda: RMSNorm.apply(x, weight, 1e-6, "llama"), x, weight) == 6 * 4
    assert kept_bytes(lambda: plain_norm(x.float(), weight, 1e-6, False), x, weight) >= 6 * 40 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_models_compute_the_same_and_come_back(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype).requires_grad_(False)
    x = model.get_input_embeddings()(tokens(2, 9))
    results, counts = [], []
    for patched in (False, True):
        patches = lean(model) if patched else None
        inputs = x.clone().requires_grad_()
        output = model(inputs_embeds=inputs).logits
        output.float().square().mean().backward()
        results.append((output.detach(), inputs.grad))
        if patches is not None:
            counts.append(len(patches.methods))
            patches.undo()
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())
    blocks, norms = 3, {"llama": 2, "qwen3": 4, "gemma3": 6, "phi3": 2}[family]
    assert counts == [blocks * (norms + 1) + 1]  # every norm of a block, its MLP, and the last norm
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_mlp_that_computes_something_else_is_left_alone() -> None:
    class Doubled(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
                mlp.gate_proj,
                mlp.up_proj,
                mlp.down_proj,
                mlp.act_fn,
            )

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = build("llama", torch.float32)
    model.model.layers[1].mlp = Doubled(model.model.layers[1].mlp)
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward  # somebody else's patch
    patched = {module for module, _ in lean(model).methods}
    assert model.model.layers[1].mlp not in patched
    assert model.model.layers[0].mlp not in patched
    assert model.model.layers[2].mlp in patched


class Norm(nn.Module):
    """Norms as families write them; each rounds in its own place."""

    def __init__(self, kind: str, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.eps, self.weight = kind, eps, nn.Parameter(torch.randn(24).to(dtype), requires_grad=False)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "llama":
            return scale * self.weight * normed.to(x.dtype)
        return (scale * (1.0 + self.weight.float() if self.kind == "gemma" else self.weight) * normed).to(x.dtype)


SomeRMSNorm = type("SomeRMSNorm", (Norm,), {})


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32,) * 2]
)
@pytest.mark.parametrize("kind", NORM_KINDS)
def test_norms_keep_their_rounding_their_eps_and_their_dtype(
    kind: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x = torch.randn(5, 24).to(dtypes[0])
    norms = nn.ModuleList([SomeRMSNorm(kind, eps, dtypes[1]) for eps in (1e-6, 0.5)])
    expected = [norm(x) for norm in norms]
    with_options = norms[0](x, scale=2.0)
    patches = lean(norms)
    assert len(patches.methods) == 2
    assert all(
        torch.equal(norm(x), theirs) and norm(x).dtype == theirs.dtype
        for norm, theirs in zip(norms, expected, strict=True)
    )
    assert torch.equal(norms[0](x, scale=2.0), with_options)


class Mlp(nn.Module):
    def __init__(self, factor: float = 1.0, dropout: float = 0.0, zero: bool = False, extra: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6, bias=False)
        self.act_fn, self.factor, self.dropout, self.extra = nn.SiLU(), factor, nn.Dropout(dropout), extra
        if zero:
            nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor, *needed: Tensor) -> Tensor:
        if self.extra:
            x = x + needed[0]
        return self.dropout(self.factor * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


def test_a_norm_that_does_not_use_its_weight_is_left_alone() -> None:
    """Falcon-Mamba's norms carry a buffer of ones for kernels, and take input of another width."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2}
    model = FalconMambaForCausalLM(FalconMambaConfig(**sizes))
    ids = torch.randint(16, (2, 5))
    expected = model(ids, use_cache=False).logits
    patches = lean(model)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert model.backbone.layers[0].mixer.dt_layernorm not in {module for module, _ in patches.methods}


def test_every_mlp_is_asked_by_itself() -> None:
    """Of one class and one shape, and yet: plain, scaled, with dropout, all zero, with an argument more, plain again."""
    mlps = nn.ModuleList([Mlp(), Mlp(factor=2.0), Mlp(dropout=0.3), Mlp(zero=True), Mlp(extra=True), Mlp()]).eval()
    state = torch.get_rng_state()
    assert list(lean(mlps).methods) == [(mlps[0], "forward"), (mlps[5], "forward")]
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in mlps.modules())


def test_undoing_leaves_what_others_have_put_there_since() -> None:
    mlps = nn.ModuleList([Mlp(), Mlp()])
    patches = lean(mlps)
    del mlps[0].forward
    mlps[1].forward = theirs = lambda x: x
    patches.undo()
    assert mlps[1].forward is theirs
    assert "forward" not in vars(mlps[0])


def test_models_without_gates_and_without_values_are_left_alone() -> None:
    assert lean(build("gpt2")).methods == {}
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        assert lean(LlamaForCausalLM(config)).methods == {}


def test_a_compiler_takes_them() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def block(x: Tensor, weight: Tensor, up: Tensor) -> Tensor:
        return GatedActivation.apply(RMSNorm.apply(x, weight, 1e-5, "llama"), up, "silu")

    x, up, weight = (torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True), torch.randn(6))
    compiled = torch.autograd.grad(block(x, weight, up).sum(), (x, up))
    expected = torch.autograd.grad((F.silu(plain_norm(x, weight, 1e-5, False)) * up).sum(), (x, up))
    for ours, plain in zip(compiled, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_experts_keep_gate_and_up_alone() -> None:
    model = mixture("qwen3-moe", torch.float32, "grouped_mm").train()  # eager code has the activation in it
    experts = model.model.layers[0].mlp.experts
    x, index = torch.randn(40, 32, requires_grad=True), torch.stack([torch.randperm(5)[:3] for _ in range(40)])
    weights = torch.rand(40, 3)
    plain = experts(x, index, weights)
    before = saved_bytes(lambda: experts(x, index, weights), own_tensors(model))
    patches = lean(model)
    torch.testing.assert_close(experts(x, index, weights), plain)
    after = saved_bytes(lambda: experts(x, index, weights), own_tensors(model))
    assert after == before - 4 * 120 * 20  # the activated gate of each pair's 20 channels
    patches.undo()
    assert "_apply_gate" not in vars(experts)
    odd = mixture("gpt-oss", torch.float32)  # another gate
    lean(odd)
    assert "_apply_gate" not in vars(odd.model.layers[0].mlp.experts)
