"""One batch with many adapters, against each row by itself in float64."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from families import build, tokens
from live import layers
from s2ft import S2FTConfig
from s2ft.format.slices import Slice
from s2ft.layer import mixed, pack
from s2ft.layer.linear import S2FTLinear
from s2ft.layer.mixed import FEW_TOKENS
from s2ft.layer.pack import MixedBatch

BASE = "__base__"


def layer_of(
    adapters: dict[str, tuple[str, int]],  # name → side, channels
    sizes: tuple[int, int] = (13, 11),
    dtype: torch.dtype = torch.float64,
    conv: bool = False,
) -> S2FTLinear:
    """A layer with these adapters, all values random and far from zero."""
    generator = np.random.default_rng(torch.initial_seed() % 2**32)
    base = (Conv1D(sizes[1], sizes[0]) if conv else nn.Linear(*sizes)).to(dtype).requires_grad_(False)
    layer: S2FTLinear | None = None
    for name, (side, count) in adapters.items():
        channels = np.sort(generator.permutation(sizes[0] if side == "in" else sizes[1])[:count])
        if layer is None:
            layer = S2FTLinear(base, name, Slice(side, channels))
        else:
            layer.update_layer(name, Slice(side, channels))
        nn.init.normal_(layer.s2ft_block[name].weight)
    assert layer is not None
    return layer.eval()


def row_by_row(layer: S2FTLinear, x: Tensor, names: list[str]) -> Tensor:
    """The reference: every row through its own dense W + ΔW, in float64."""
    base = layer.get_base_layer()
    weight = (base.weight.T if isinstance(base, Conv1D) else base.weight).double()
    rows = []
    for row, name in zip(x.double(), names, strict=True):
        dense = weight
        if name in layer.s2ft_block:
            block = layer.s2ft_block[name]
            delta = block.weight.to(x.dtype).double()
            dense = dense.index_add(1 if block.side == "in" else 0, block.indices, delta)
        rows.append(row @ dense.T + base.bias.double())
    return torch.stack(rows)


cases = st.fixed_dictionaries(
    {
        "adapters": st.lists(st.tuples(st.sampled_from(["in", "out"]), st.integers(1, 9)), min_size=1, max_size=6),
        "rows": st.lists(st.integers(-2, 6), min_size=1, max_size=9),  # -2: base, -1: a name without a slice here
        "leading": st.sampled_from([(), (1,), (3,), (2, 2), (FEW_TOKENS + 1,), (5, 7)]),
        "sizes": st.tuples(st.integers(9, 17), st.integers(9, 17)),
        "conv": st.booleans(),
        "gradients": st.booleans(),
    }
)


@settings(max_examples=80, deadline=None)
@given(cases)
def test_rows_are_those_of_each_adapter(case: dict[str, Any]) -> None:
    adapters = {f"a{number}": adapter for number, adapter in enumerate(case["adapters"])}
    layer = layer_of(adapters, case["sizes"], conv=case["conv"])
    pick = [BASE, "elsewhere", *adapters]
    names = [pick[(row + 2) % len(pick)] for row in case["rows"]]
    x = torch.randn(len(names), *case["leading"], case["sizes"][0], dtype=torch.float64)
    with torch.set_grad_enabled(case["gradients"]):
        for _ in range(2):  # with a new table, and with the kept one
            torch.testing.assert_close(layer(x, adapter_names=names), row_by_row(layer, x, names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 3, FEW_TOKENS + 1])
@torch.no_grad()
def test_half_precision_stays_within_its_rounding(dtype: torch.dtype, count: int) -> None:
    layer = layer_of({"a": ("in", 40), "b": ("out", 7), "c": ("in", 3), "d": ("out", 31)}, (64, 48), dtype)
    names = ["d", "a", BASE, "c", "b", "a"]
    x = torch.randn(6, count, 64, dtype=dtype)
    y, reference = layer(x, adapter_names=names), row_by_row(layer, x, names)
    assert y.dtype == dtype
    plain = layer.get_base_layer()(x).double()
    scale = reference.abs().max()
    assert (y.double() - reference).abs().max() < 4 * torch.finfo(dtype).eps * scale
    assert (plain - reference).abs().max() > 0.1 * scale  # what a forgotten slice would leave


def test_autocast_and_inference_mode() -> None:
    layer = layer_of({"a": ("in", 5), "b": ("out", 4)}, dtype=torch.float32)
    x, names = torch.randn(3, 2, 13), ["b", BASE, "a"]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x, adapter_names=names)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), row_by_row(layer, x, names), atol=0.15, rtol=0.02)
    with torch.no_grad():  # the same layer, now in float32
        torch.testing.assert_close(layer(x, adapter_names=names), row_by_row(layer, x, names).float())


@pytest.mark.parametrize("shape", [(4, 13), (4, 3, 13)])
def test_gradients_are_those_of_the_rows(shape: tuple[int, ...]) -> None:
    layer = layer_of({"a": ("in", 5), "b": ("out", 4), "c": ("in", 1), "unused": ("out", 2)})
    for block in layer.s2ft_block.values():
        block.weight.requires_grad_()
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    names = ["b", "a", "c", "a"]
    leaves = [x, *(layer.s2ft_block[name].weight for name in "abc")]
    found, wanted = layer(x, adapter_names=names), row_by_row(layer, x, names)
    cotangent = torch.randn_like(found)
    for got, expected in zip(
        torch.autograd.grad(found, leaves, cotangent), torch.autograd.grad(wanted, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(got, expected)


ORDERS = {
    "one row each, in order": (["a", "b", "c", "d"], True),
    "one row each": (["c", "a", "d", "b"], True),
    "as many rows each": (["b", "a", "c", "d", "a", "b", "d", "c"], True),
    "some padding": (["a", "b", BASE, "c", "a", "d", "b"], True),
    "mostly padding": (["a", "b", "c", "d", *"aaaaaa"], False),
}


class TestAdaptersOfOneRank:
    """They lie side by side in the table, whose rows are multiplied where they are."""

    @pytest.mark.parametrize("side", ["in", "out"])
    @pytest.mark.parametrize("order", list(ORDERS))
    @torch.no_grad()
    def test_rows_in_any_order(self, side: str, order: str) -> None:
        names, by_matrices = ORDERS[order]
        layer = layer_of(dict.fromkeys("abcd", (side, 5)))
        for length in (1, 3, FEW_TOKENS + 1):
            x = torch.randn(len(names), length, 13, dtype=torch.float64)
            for batch in (names, names[::-1]):  # the table of the first serves the second
                torch.testing.assert_close(layer(x, adapter_names=batch), row_by_row(layer, x, batch))
        assert (self.plan(layer, names) is not None) == by_matrices

    def plan(self, layer: S2FTLinear, names: list[str], dtype: torch.dtype = torch.float64) -> Any:
        """What decoding would multiply as matrices; None if it takes bags."""
        batch, x = MixedBatch(names), torch.zeros(len(names), 1, 13, dtype=dtype)
        y = torch.zeros(len(names), 1, 11, dtype=dtype)
        steps = mixed._steps(layer, batch, y, x, 1)
        return None if steps[0][0] is mixed._by_pairs else [plan for _, _, plan in steps]

    def test_in_the_tables_order_nothing_is_copied(self) -> None:
        layer = layer_of(dict.fromkeys("abcd", ("in", 5)))
        (whole,) = self.plan(layer, ["c", "a", "d", "b"])
        assert (whole.shape, whole.is_whole) == ((4, 1, 5), True)
        (other,) = self.plan(layer, ["a", "b", "c", "d"])  # by the table that the layer has
        assert (other.members.tolist(), other.is_whole) == ([2, 0, 3, 1], False)
        assert other.table.data_ptr() == whole.table.data_ptr() == pack._tables[layer][1][0].table.data_ptr()

    @torch.no_grad()
    def test_rows_of_their_own_take_two_operations(self) -> None:
        layer, names = layer_of(dict.fromkeys("abcd", ("in", 5))), ["c", "a", "d", "b"]
        batch, x = MixedBatch(names), torch.randn(4, 1, 13, dtype=torch.float64)
        expected = row_by_row(layer, x, names) - layer.base_layer(x)
        for number in range(3):  # the first finds out how
            y = torch.zeros(4, 1, 11, dtype=torch.float64)
            with Operations() as found:
                mixed.add_mixed(layer, y, x, batch)
            torch.testing.assert_close(y, expected)
            assert number == 0 or found.count == 2

    def test_bags_are_for_half_precision_and_for_many_ranks(self) -> None:
        layer = layer_of({f"a{count}": ("in", count) for count in range(1, 7)})
        assert self.plan(layer, [f"a{count}" for count in (1, 2, 3, 4)]) is not None
        assert self.plan(layer, [f"a{count}" for count in (1, 2, 3, 4, 5)]) is None
        assert self.plan(layer, ["a1", "a2"], torch.bfloat16) is None


class TestTheTable:
    """It is kept from call to call, and made anew when an adapter is not what it was."""

    @torch.no_grad()
    def check(self, layer: S2FTLinear, names: list[str]) -> None:
        x = torch.randn(len(names), 1, 13, dtype=torch.float64)
        torch.testing.assert_close(layer(x, adapter_names=names), row_by_row(layer, x, names))

    def test_follows_every_change(self) -> None:
        layer, names = layer_of({"a": ("in", 5), "b": ("out", 4)}), ["b", "a", BASE]
        self.check(layer, names)
        with torch.no_grad():
            layer.s2ft_block["a"].weight.mul_(2)
        self.check(layer, names)
        layer.s2ft_block["a"].weight.data = torch.randn(11, 5, dtype=torch.float64)
        self.check(layer, names)
        layer.s2ft_block["b"].weight = nn.Parameter(torch.randn(4, 13, dtype=torch.float64))
        self.check(layer, names)
        layer.train()
        layer.s2ft_block["b"].weight.data.mul_(3)  # not counted by torch
        layer.eval()
        self.check(layer, names)
        layer.delete_adapter("b")
        self.check(layer, names)
        layer.update_layer("b", Slice("in", np.array([0, 7])), init_weights=False)
        self.check(layer, names)
        self.check(layer, ["a", BASE, "b"])

    def test_does_not_keep_a_deleted_adapter(self) -> None:
        layer = layer_of({"a": ("in", 5), "b": ("out", 4)})
        self.check(layer, ["a", "b"])
        block = weakref.ref(layer.s2ft_block["b"].weight)
        layer.delete_adapter("b")
        gc.collect()
        assert block() is None

    def test_has_a_row_for_each_channel_and_one_of_zeros(self) -> None:
        layer, batch = layer_of({"a": ("in", 9), "b": ("in", 1), "c": ("out", 2)}), MixedBatch(["c", "b", "a", "b"])
        inputs, outputs = sorted(
            pack.pack_slices(layer, batch, torch.zeros(0, dtype=torch.float32)), key=lambda p: p.side
        )
        assert (inputs.table.shape, outputs.table.shape) == ((11, 11), (3, 13))
        assert inputs.table.dtype == torch.float32
        assert inputs.table.is_contiguous()
        assert not inputs.table[-1].any()
        pairs = mixed._pairs(inputs, batch.of_row, 2, 13, torch.device("cpu"))
        assert len(pairs.rows) == 2 * (9 + 1 + 1)  # no padding


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, FEW_TOKENS + 1])
@torch.no_grad()
def test_operations_do_not_grow_with_the_adapters(count: int) -> None:
    def operations(adapters: int) -> int:
        layer = layer_of({f"a{n}": ("out" if n % 2 else "in", 3) for n in range(adapters)})
        x, batch = torch.randn(40, count, 13, dtype=torch.float64), MixedBatch(f"a{n % adapters}" for n in range(40))
        layer(x, adapter_names=batch)
        with Operations() as counter:
            layer(x, adapter_names=batch)
        return counter.count

    assert operations(40) <= operations(2)


class TestModel:
    def model(self) -> Any:
        from peft import get_peft_model

        model = get_peft_model(build("llama"), S2FTConfig(ratios=0.4, seed=1, init_weights=False), adapter_name="a")
        model.add_adapter("b", S2FTConfig(ratios=0.2, seed=2, init_weights=False))
        return model.eval()

    def test_plans_once_and_packs_once_while_generating(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, made, packed = self.model(), [], []
        monkeypatch.setattr("s2ft.tuner.mixing.MixedBatch", lambda names: made.append(1) or MixedBatch(names))
        original = pack.pack_slices
        monkeypatch.setattr(pack, "pack_slices", lambda *args: packed.append(args[0]) or original(*args))
        model.generate(
            input_ids=tokens(3, 4), adapter_names=["b", "a", BASE], max_new_tokens=5, min_new_tokens=5, do_sample=False
        )
        assert len(made) == 2  # one for each row, one for each beam
        assert len(packed) == len(layers(model))
        assert set(packed) == set(layers(model))

    def test_a_table_does_not_outlive_its_model(self) -> None:
        model = self.model()
        with torch.no_grad():
            model(input_ids=tokens(2, 3), adapter_names=["a", "b"])
        own = {layer: packs for layer, (_, packs) in pack._tables.items() if layer in set(model.modules())}
        held = [weakref.ref(packs[0].table) for packs in own.values()]
        assert held
        del model, own
        gc.collect()
        assert not any(table() is not None for table in held)

    def test_a_layer_compiles(self) -> None:
        layer, names = layer_of({"a": ("in", 5), "b": ("out", 4)}), ["b", BASE, "a"]
        x = torch.randn(3, 2, 13, dtype=torch.float64)
        with torch.no_grad():
            compiled = torch.compile(layer, backend="eager")
            torch.testing.assert_close(compiled(x, adapter_names=names), row_by_row(layer, x, names))
