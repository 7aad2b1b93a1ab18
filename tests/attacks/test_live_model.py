"""Random operations on a live model, against a dense model that is computed independently of it.

What is known of the model is written down in `Expected`: which adapters are active, merged, switched to, disabled, laid out.
After every operation the model's output must be that of dense weights W + ΔW in float64, its own word for its state must agree,
and wherever no adapter may stand in the base weights, they must be the base's bit for bit.
"""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import s2ft
from s2ft import S2FTConfig
from s2ft.layer.linear import S2FTLinear
from s2ft.tuner.switching import park

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MOST = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.15}  # relative error
KINDS: list[dict[str, Any]] = [  # adapters that hold different modules, on both sides
    {"ratios": {"o_proj": 0.5, "down_proj": 0.5}},
    {"ratios": {"down_proj": 0.4}},
    {"ratios": {"o_proj": 0.5}, "layers": [1]},
    {"ratios": {"q_proj": 0.5, "v_proj": 0.5, "o_proj": 0.5}, "layers": [0]},
    {"ratios": {"up_proj": 0.4, "down_proj": 0.3}},
    {"ratios": 0.4, "target_modules": ["lm_head", "k_proj"]},  # whose weight is the embedding's too
]
NAMES = "abc"
names = st.sampled_from(NAMES)
several = st.lists(names, min_size=1, max_size=3)

Part = tuple[str, Tensor, Tensor]  # side, channels, values


@dataclass
class Expected:
    """What the model should be doing."""

    adapters: dict[str, dict[str, Part]] = field(default_factory=dict, repr=False)  # name → module → its slice
    active: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    switched: tuple[str | None] | None = None  # None: not switched; (None,): to the base
    disabled: bool = False
    laid_out: bool = False

    @property
    def stands(self) -> list[str]:
        """The adapters that stand in the base weights, unless they are disabled."""
        return self.merged or [name for name in self.switched or () if name is not None]

    @property
    def running(self) -> list[str]:
        """The adapters whose changes a forward pass shows."""
        if self.disabled:
            return []
        return self.stands or ([] if self.switched else self.active)


def tiny(dtype: torch.dtype) -> LlamaForCausalLM:
    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


class LiveModel(RuleBasedStateMachine):
    """One model through random operations."""

    @initialize(dtype=st.sampled_from(DTYPES), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31))
    def start(self, dtype: torch.dtype, kind: dict[str, Any], seed: int) -> None:
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")
        base = tiny(dtype)
        self.plain = copy.deepcopy(base)  # the base's own values, cast as the model is
        self.double = copy.deepcopy(base).double()
        self.coarsest = dtype
        self.ids = torch.randint(23, (3, 5))
        self.expected = Expected(active=["a"])
        other = KINDS[int(torch.randint(len(KINDS), ()))]
        self.inside: Any = None
        self.model: PeftModel = get_peft_model(base, self.config(kind), adapter_name="a").eval()
        self.model.add_adapter("b", self.config(other))
        self.note("a")
        self.note("b")

    def config(self, kind: dict[str, Any]) -> S2FTConfig:
        return S2FTConfig(**kind, init_weights=False, seed=int(torch.randint(1000, ())), task_type="CAUSAL_LM")

    def layers(self) -> dict[str, S2FTLinear]:
        found = self.model.get_base_model().named_modules()
        return {path: module for path, module in found if isinstance(module, S2FTLinear)}

    def note(self, name: str, anew: bool = True) -> None:
        """Gives a new adapter values that are seen in the output, and writes them down."""
        parts = {}
        for path, layer in self.layers().items():
            if name in layer.s2ft_block:
                block = layer.s2ft_block[name]
                if anew:
                    block.weight.data.normal_(std=0.5)
                parts[path] = (block.side, block.indices.clone(), block.weight.detach().clone())
        assert parts
        self.expected.adapters[name] = parts

    def weights(self, running: Iterable[str]) -> dict[str, Tensor]:
        """Dense weights in float64: the base's, and what each adapter adds."""
        dense = {name: value.double() for name, value in self.plain.state_dict().items()}  # lm_head by itself
        for name in dict.fromkeys(running):
            for path, (side, channels, values) in self.expected.adapters[name].items():
                weight = dense[f"{path}.weight"]
                dense[f"{path}.weight"] = weight.index_add(1 if side == "in" else 0, channels, values.double())
        return dense

    @torch.no_grad()
    def reference(self, running: Iterable[str], ids: Tensor) -> Tensor:
        return torch.func.functional_call(self.double, self.weights(running), (ids,), tie_weights=False).logits

    def close(self, found: Tensor, wanted: Tensor) -> None:
        error = float((found.double() - wanted).norm() / wanted.norm())
        assert error < MOST[self.coarsest], f"relative error {error:.2g} in {self.expected}"

    def attempt(self, allowed: bool, call: Callable[[], Any]) -> bool:
        """Does it; or sees it refused. What a refusal has changed the invariants will show."""
        if allowed:
            call()
            return True
        with pytest.raises((s2ft.S2FTError, ValueError)):
            call()
        return False

    # ---- operations --------------------------------------------------------------------------------------------------

    @rule(name=names, kind=st.sampled_from(KINDS))
    def add(self, name: str, kind: dict[str, Any]) -> None:
        if name in self.expected.adapters:
            return
        config = self.config(kind)
        if self.attempt(not self.expected.laid_out, lambda: self.model.add_adapter(name, config)):
            self.note(name)
            self.expected.merged = []  # PEFT's way: it says so, and unmerges

    @rule(chosen=several)
    def set_adapter(self, chosen: list[str]) -> None:
        expected = self.expected
        distinct = list(dict.fromkeys(chosen))
        known = set(chosen) <= set(expected.adapters)
        allowed = known and (not expected.laid_out or distinct == expected.active)
        target = self.model if len(chosen) == 1 and known and allowed else self.model.base_model
        if self.attempt(allowed, lambda: target.set_adapter(chosen[0] if len(chosen) == 1 else chosen)):
            expected.active, expected.merged, expected.switched = distinct, [], None

    @rule(name=names)
    def delete(self, name: str) -> None:
        expected = self.expected
        if name not in expected.adapters or len(expected.adapters) == 1:
            return
        if name == self.model.active_adapter and expected.active != [name]:
            return  # set on `base_model`, so PeftModel's own field is behind, and PEFT looks the deleted name up
        allowed = name not in expected.merged and not expected.laid_out
        if self.attempt(allowed, lambda: self.model.delete_adapter(name)):
            del expected.adapters[name]
            if expected.switched == (name,):
                expected.switched = (None,)
            if name in expected.active:
                rest = [other for other in expected.active if other != name]
                expected.active = rest or [sorted(expected.adapters)[0]]

    @rule(chosen=st.none() | several, safe=st.booleans())
    def merge(self, chosen: list[str] | None, safe: bool) -> None:
        expected = self.expected
        wanted = expected.active if chosen is None else chosen
        standing = expected.switched is not None and expected.switched != (None,)
        allowed = set(wanted) <= set(expected.adapters) and not expected.laid_out and not standing
        if self.attempt(allowed, lambda: self.model.merge_adapter(chosen, safe_merge=safe)):
            expected.merged = list(dict.fromkeys([*expected.merged, *wanted]))

    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.expected.merged = []

    @rule(name=st.none() | names)
    def switch(self, name: str | None) -> None:
        expected = self.expected
        known = name is None or name in expected.adapters
        allowed = known and not expected.merged and not expected.laid_out
        if self.attempt(allowed, lambda: s2ft.switch(self.model, name)):
            expected.switched = (name,)

    @rule(disabled=st.booleans())
    def disable(self, disabled: bool) -> None:
        tuner = self.model.base_model
        (tuner.disable_adapter_layers if disabled else tuner.enable_adapter_layers)()
        self.expected.disabled = disabled

    @rule()
    def disable_for_a_while(self) -> None:
        with self.model.disable_adapter(), torch.no_grad():
            self.close(self.model(self.ids).logits, self.reference([], self.ids))

    @precondition(lambda self: not self.expected.laid_out)
    @rule()
    def enter(self) -> None:
        expected = self.expected
        allowed = len(expected.active) == 1 and not expected.merged and expected.switched is None
        inside = s2ft.in_place(self.model)
        if self.attempt(allowed, inside.__enter__):
            self.inside, expected.laid_out = inside, True

    @precondition(lambda self: self.expected.laid_out)
    @rule()
    def leave(self) -> None:
        self.inside.__exit__(None, None, None)
        self.expected.laid_out = False

    @rule(chosen=st.lists(st.sampled_from([*NAMES, "__base__"]), min_size=3, max_size=3))
    def mix(self, chosen: list[str]) -> None:
        expected = self.expected
        known = set(chosen) <= {*expected.adapters, "__base__"}
        if expected.disabled and known:
            try:
                with torch.no_grad():
                    self.close(self.model(self.ids, adapter_names=chosen).logits, self.reference([], self.ids))
            except s2ft.S2FTError:
                assert expected.stands or expected.laid_out
            return
        allowed = known and not expected.stands and not expected.laid_out
        with torch.no_grad():
            if self.attempt(allowed, lambda: setattr(self, "mixed", self.model(self.ids, adapter_names=chosen).logits)):
                for row, name in enumerate(chosen):
                    running = [] if name == "__base__" else [name]
                    self.close(self.mixed[row : row + 1], self.reference(running, self.ids[row : row + 1]))

    @precondition(lambda self: self.expected.switched is None and not self.expected.merged and self.expected.running)
    @rule()
    def train(self) -> None:
        """A step of plain gradient descent; the gradient is the dense weight's."""
        running = self.expected.running
        parameters = [
            (name, path, layer.s2ft_block[name].weight.requires_grad_())
            for name in running
            for path, layer in self.layers().items()
            if name in layer.s2ft_block
        ]
        self.model.train()
        self.model.zero_grad()
        self.model(self.ids, labels=self.ids).loss.backward()
        self.model.eval()
        dense = {name: value.detach().requires_grad_() for name, value in self.weights(running).items()}
        labels = {"labels": self.ids}
        torch.func.functional_call(self.double, dense, (self.ids,), labels, tie_weights=False).loss.backward()
        for name, path, parameter in parameters:
            side, channels, _ = self.expected.adapters[name][path]
            wanted = dense[f"{path}.weight"].grad.index_select(1 if side == "in" else 0, channels)
            error = (parameter.grad.double() - wanted).norm()
            assert error <= 2 * MOST[self.coarsest] * max(float(wanted.norm()), 0.05), f"gradient of {name} in {path}"
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad / (1 + parameter.grad.norm())
            parameter.grad = None
        for name in running:
            self.note(name, anew=False)

    @rule(dtype=st.sampled_from(DTYPES))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.plain.to(dtype)
        self.coarsest = max(self.coarsest, dtype, key=MOST.__getitem__)
        for name in self.expected.adapters:
            before = {path: values for path, (_, _, values) in self.expected.adapters[name].items()}
            self.note(name, anew=False)
            for path, (_, _, values) in self.expected.adapters[name].items():
                assert torch.equal(values, before[path].to(dtype))

    @rule(name=names)
    def park(self, name: str) -> None:
        self.attempt(name in self.expected.adapters, lambda: park(self.model, name))

    @rule(name=names, chosen=several)
    def combine(self, name: str, chosen: list[str]) -> None:
        expected = self.expected
        distinct = list(dict.fromkeys(chosen))
        if name in expected.adapters or not set(distinct) <= set(expected.adapters):
            return
        sides: dict[str, set[str]] = {}
        for source in distinct:
            for path, (side, _, _) in expected.adapters[source].items():
                sides.setdefault(path, set()).add(side)
        weights = [1.5, -0.5, 0.25][: len(distinct)]
        allowed = not expected.laid_out
        with s2ft.any_base():  # a cast down and up again rounds the base that was digested
            if not self.attempt(allowed, lambda: self.model.add_weighted_adapter(distinct, weights, name)):
                return
        expected.merged = []
        self.note(name, anew=False)
        for path in sides:
            shape = self.plain.get_submodule(path).weight.shape
            wanted = sum(
                w * full(expected.adapters[s].get(path), shape) for w, s in zip(weights, distinct, strict=True)
            )
            found = full(expected.adapters[name].get(path), shape)
            assert (found - wanted).norm() <= MOST[self.coarsest] * wanted.norm()

    @rule(name=names, scale=st.sampled_from([-0.7, 0.5, 1.5]))
    def load_state_dict(self, name: str, scale: float) -> None:
        expected = self.expected
        if name not in expected.adapters:
            return
        state = get_peft_model_state_dict(self.model, adapter_name=name)
        deltas = {key: value.clone() for key, value in state.items() if key.endswith("s2ft_block.weight")}
        assert len(deltas) == len(expected.adapters[name])
        for key, value in deltas.items():
            path = key.removeprefix("base_model.model.").split(".s2ft_block")[0]
            assert torch.equal(value, expected.adapters[name][path][2])
        scaled = {key: scale * value if key in deltas else value for key, value in state.items()}
        set_peft_model_state_dict(self.model, scaled, adapter_name=name)
        self.note(name, anew=False)

    @precondition(lambda self: self.expected.stands and not self.expected.disabled)
    @rule()
    def load_base_weights(self) -> None:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.attempt(False, lambda: self.model.load_state_dict(state))

    @rule(name=names, under=names)
    def save_and_load(self, name: str, under: str) -> None:
        expected = self.expected
        if name not in expected.adapters:
            return
        with TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            (file,) = Path(folder).rglob("adapter_model.safetensors")
            saved = load_file(file)
            for path, (_, _, values) in expected.adapters[name].items():
                assert torch.equal(saved[f"base_model.model.{path}.s2ft_block.weight"], values)
            if under in expected.adapters:
                return
            with s2ft.any_base():  # a cast down and up again rounds the base that was digested
                load = lambda: self.model.load_adapter(str(file.parent), adapter_name=under)  # noqa: E731
                if self.attempt(not expected.laid_out, load):
                    self.note(under, anew=False)
                    expected.merged = []
                    for path, (_, _, values) in expected.adapters[name].items():
                        assert torch.equal(expected.adapters[under][path][2].to(values.dtype), values)

    @precondition(lambda self: not self.expected.laid_out)
    @rule(by_pickle=st.booleans())
    def copy(self, by_pickle: bool) -> None:
        """Goes on with a copy; what is done to the copy does not reach the first."""
        twin = pickle.loads(pickle.dumps(self.model)) if by_pickle else copy.deepcopy(self.model)
        s2ft_free = {name: value.clone() for name, value in twin.state_dict().items()}
        self.model.base_model.set_adapter(self.model.base_model.active_adapters)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        assert all(torch.equal(value, s2ft_free[name]) for name, value in twin.state_dict().items())
        self.model = twin

    @rule(name=names)
    def delta(self, name: str) -> None:
        for path, part in self.expected.adapters.get(name, {}).items():
            found = self.layers()[path].get_delta_weight(name)
            assert torch.equal(found, full(part, found.shape).to(found.dtype))

    # ---- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def output_is_the_dense_models(self) -> None:
        with torch.no_grad():
            self.close(self.model(self.ids).logits, self.reference(self.expected.running, self.ids))

    @invariant()
    def model_and_layers_agree(self) -> None:
        expected = self.expected
        assert set(self.model.peft_config) == set(expected.adapters)
        assert self.model.base_model.active_adapters == expected.active
        for path, layer in self.layers().items():
            assert layer.active_adapters == expected.active, path
            assert layer.merged_adapters == expected.merged, path
            assert layer.disable_adapters == expected.disabled, path
            assert (layer.switched_to,) == (expected.switched or (None,)), path
            assert layer.is_switched == (expected.switched is not None), path

    @invariant()
    def base_is_its_own_where_nothing_stands_in_it(self) -> None:
        if (not self.expected.disabled and self.expected.stands) or self.expected.laid_out:
            return
        self.compare(self.model.get_base_model())

    def compare(self, model: nn.Module) -> None:
        found = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
        assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()
        for name, value in self.plain.state_dict().items():
            assert torch.equal(found[name], value), f"{name} differs in {self.expected}"

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        if self.expected.laid_out:
            self.inside.__exit__(None, None, None)
        self.model.unmerge_adapter()
        self.compare(self.model.unload())


def full(part: Part | None, shape: torch.Size) -> Tensor:
    """The slice as a dense matrix."""
    dense = torch.zeros(shape, dtype=torch.float64)
    if part is None:
        return dense
    side, channels, values = part
    return dense.index_add(1 if side == "in" else 0, channels, values.double())


@pytest.mark.soak
def test_random_operations_against_a_dense_model(tries: Callable[[int, int], int], one_thread: None) -> None:
    run_state_machine_as_test(
        LiveModel,
        settings=settings(
            max_examples=tries(60, 8000),
            stateful_step_count=25,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
