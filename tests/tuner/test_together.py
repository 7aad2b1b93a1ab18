"""Switching, merging, pools, names and state dicts: what each does while another is under way."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from packaging.version import Version
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import s2ft
from families import build, tokens
from live import layers, logits
from quantised import stand_in
from s2ft import S2FTConfig, S2FTError
from s2ft.format.slices import Slice
from s2ft.layer.linear import S2FTLinear
from s2ft.layer.linears import why_not_plain
from s2ft.training.in_place import enter
from s2ft.tuner.pool import AdapterPool


def model() -> PeftModel:
    """With the adapters "default" and "b", in evaluation mode."""
    made = get_peft_model(build("llama", torch.float64), S2FTConfig(ratios=0.3, init_weights=False, seed=1))
    made.add_adapter("b", S2FTConfig(ratios=0.3, init_weights=False, seed=2))
    return made.eval()


def base_output(made: PeftModel, ids: Tensor) -> Tensor:
    with made.disable_adapter():
        return logits(made, ids)


def test_disabling_gives_the_base_when_an_adapter_was_merged_after_switching_to_none() -> None:
    made, ids = model(), tokens(2, 7)
    expected = base_output(made, ids)
    s2ft.switch(made, None)
    made.merge_adapter(["default"])
    torch.testing.assert_close(base_output(made, ids), expected)


@pytest.mark.parametrize("name", ["__base__", "keys", "forward", "a.b", "a/b", ""])
def test_names_with_another_meaning_are_refused(name: str) -> None:
    made = model()
    with pytest.raises((S2FTError, ValueError), match="adapter"):
        made.add_adapter(name, S2FTConfig(ratios=0.3))
    with pytest.raises((S2FTError, ValueError), match="adapter"):
        made.add_weighted_adapter(["default", "b"], [0.5, 0.5], name)
    assert set(made.peft_config) == {"default", "b"}


def merged(made: PeftModel) -> Any:
    made.merge_adapter(["b"])
    return made.unmerge_adapter


def switched(made: PeftModel) -> Any:
    s2ft.switch(made, "b")
    return lambda: s2ft.switch(made, None)


@pytest.mark.parametrize("change", [merged, switched])
def test_base_weights_are_not_loaded_over_an_adapter_that_stands_in_them(change: Any) -> None:
    made = model()
    own = {name: value.clone() for name, value in made.state_dict().items()}
    layer = made.get_base_model().model.layers[0].mlp.down_proj
    undo = change(made)
    for target in (made, layer):
        other = {name: 2 * value for name, value in target.state_dict().items() if value.is_floating_point()}
        with pytest.raises(S2FTError, match="loading base weights"):
            target.load_state_dict(other, strict=False)
    undo()
    assert all(torch.equal(value, own[name]) for name, value in made.state_dict().items())


def test_a_name_of_the_pool_is_not_loaded_into_the_model(tmp_path: Path) -> None:
    base = build("llama", torch.float32)
    for name, seed in (("alice", 3), ("bob", 4)):
        copy = build("llama", torch.float32)
        copy.load_state_dict(base.state_dict())
        get_peft_model(copy, S2FTConfig(ratios=0.3, init_weights=False, seed=seed)).save_pretrained(tmp_path / name)
    made = get_peft_model(base, S2FTConfig(ratios=0.3, init_weights=False, seed=1)).eval()
    pool = AdapterPool(made, str(tmp_path), device_bytes=1 << 24, host_bytes=1 << 24)
    ids = tokens(2, 5)
    with torch.no_grad():
        expected = made(ids, adapter_names=["alice", "bob"]).logits
        with pytest.raises(S2FTError, match="'alice' is a name of the model's AdapterPool"):
            made.load_adapter(str(tmp_path / "bob"), adapter_name="alice")
        torch.testing.assert_close(made(ids, adapter_names=["alice", "bob"]).logits, expected)
        s2ft.switch(made, "default")
        with pytest.raises(S2FTError, match="switched to 'default'"):
            made(ids, adapter_names=["alice", "bob"])
    made.set_adapter("default")
    made.unload()
    pool.close()


class TestAdaptersOfDifferentModules:
    """One model, one answer: a layer without the adapter runs its base."""

    def made(self) -> PeftModel:
        """ "default" on o, "b" on down, "c" on down and up."""
        made = get_peft_model(build("llama"), S2FTConfig(ratios={"o_proj": 0.5}, init_weights=False), "default")
        for name, ratios in {"b": {"down_proj": 0.4}, "c": {"down_proj": 0.4, "up_proj": 0.3}}.items():
            made.add_adapter(name, S2FTConfig(ratios=ratios, init_weights=False))
        return made.eval()

    def alone(self, made: PeftModel, name: str, ids: Tensor) -> Tensor:
        twin = copy.deepcopy(made)
        twin.set_adapter(name)
        return logits(twin, ids)

    def test_after_deleting_the_active_one_all_layers_run_the_same(self) -> None:
        made, ids = self.made(), tokens(2, 7)
        expected = self.alone(made, "b", ids)
        made.delete_adapter("default")
        assert made.active_adapters == ["b"]
        assert {tuple(layer.active_adapters) for layer in layers(made)} == {("b",)}
        torch.testing.assert_close(logits(made, ids), expected)

    def test_by_transformers_own_calls_too(self) -> None:
        made, ids = build("llama"), tokens(2, 7)
        for name, ratios in {"a": {"o_proj": 0.5}, "b": {"down_proj": 0.4}, "c": {"up_proj": 0.4}}.items():
            made.add_adapter(S2FTConfig(ratios=ratios, init_weights=False), adapter_name=name)
        made.set_adapter("b")
        expected = logits(made, ids)
        made.set_adapter("a")
        made.delete_adapter("a")
        assert {tuple(layer.active_adapters) for layer in layers(made)} == {("b",)}
        torch.testing.assert_close(logits(made, ids), expected)

    def test_merging_one_while_another_is_active_shows_that_one(self) -> None:
        made, ids = self.made(), tokens(2, 7)
        expected = self.alone(made, "b", ids)
        made.merge_adapter(["b"])
        torch.testing.assert_close(logits(made, ids), expected)
        assert made.get_model_status().merged_adapters == ["b"]
        made.unmerge_adapter()
        torch.testing.assert_close(logits(made, ids), self.alone(made, "default", ids))

    def test_a_name_counts_once(self) -> None:
        made, ids = self.made(), tokens(2, 7)
        expected = self.alone(made, "c", ids)
        made.merge_adapter(["c", "c"])
        torch.testing.assert_close(logits(made, ids), expected)
        made.base_model.set_adapter(["c", "c"])
        torch.testing.assert_close(logits(made, ids), expected)

    @pytest.mark.parametrize("call", ["merge_adapter", "set_adapter"])
    def test_a_name_that_is_not_loaded_is_refused(self, call: str) -> None:
        made, ids = self.made(), tokens(2, 7)
        expected = logits(made, ids)
        with pytest.raises(S2FTError, match=r"adapter 'z' is not loaded; loaded are 'default', 'b', 'c'"):
            getattr(made.base_model, call)(["b", "z"])
        assert torch.equal(logits(made, ids), expected)


class TestWhileAdaptersAreDisabled:
    """The base inside; what is done there shows after it."""

    @pytest.mark.parametrize("switched", [False, True])
    def test_merging(self, switched: bool) -> None:
        made, ids = model(), tokens(2, 7)
        base = base_output(made, ids)
        made.set_adapter("b")
        expected = logits(made, ids)
        made.set_adapter("default")
        if switched:
            s2ft.switch(made, None)
        with made.disable_adapter():
            made.merge_adapter(["b"])
            assert torch.equal(logits(made, ids), base)
        torch.testing.assert_close(logits(made, ids), expected)
        made.unmerge_adapter()
        assert torch.equal(base_output(made, ids), base)

    def test_a_merged_adapter_comes_back(self) -> None:
        made, ids = model(), tokens(2, 7)
        base = base_output(made, ids)
        made.merge_adapter(["b"])
        merged = logits(made, ids)
        with made.disable_adapter():
            assert torch.equal(logits(made, ids), base)
        assert torch.equal(logits(made, ids), merged)

    def test_an_adapter_that_is_added_there_is_disabled_too(self) -> None:
        made, ids = model(), tokens(2, 7)
        base = base_output(made, ids)
        with made.disable_adapter():
            made.add_adapter("c", S2FTConfig(ratios={"k_proj": 0.5}, init_weights=False))
            made.set_adapter("c")
            assert torch.equal(logits(made, ids), base)
        assert not torch.allclose(logits(made, ids), base)

    @pytest.mark.parametrize("switched", [False, True])
    def test_a_mixed_batch_is_the_bases(self, switched: bool) -> None:
        made, ids = model(), tokens(2, 7)
        base = base_output(made, ids)
        if switched:
            s2ft.switch(made, None)
        made.base_model.disable_adapter_layers()
        with torch.no_grad():
            assert torch.equal(made(ids, adapter_names=["b", "default"]).logits, base)

    def test_merging_for_good(self) -> None:
        made, ids = model(), tokens(2, 7)
        expected = logits(made, ids)
        made.base_model.disable_adapter_layers()
        torch.testing.assert_close(logits(made.merge_and_unload(), ids), expected)


@pytest.mark.parametrize("change", ["merge", "switch"])
def test_an_adapter_that_is_loaded_anew_while_it_stands_in_the_base(change: str) -> None:
    made, ids = model(), tokens(2, 7)
    made.set_adapter("b")
    own = {name: value.clone() for name, value in made.state_dict().items() if "s2ft_block" not in name}
    state = get_peft_model_state_dict(made, adapter_name="b")
    doubled = {name: 2 * value if name.endswith("weight") else value for name, value in state.items()}
    twin = copy.deepcopy(made)
    set_peft_model_state_dict(twin, doubled, adapter_name="b")
    undo = merged(made) if change == "merge" else switched(made)
    set_peft_model_state_dict(made, doubled, adapter_name="b")
    torch.testing.assert_close(logits(made, ids), logits(twin, ids))
    undo()
    assert all(torch.equal(made.state_dict()[name], value) for name, value in own.items())


def test_an_adapter_of_a_tied_head_is_saved_and_loaded_under_another_name(tmp_path: Path) -> None:
    made, ids = TestSharedWeights().tied(), tokens(2, 7)
    expected = logits(made, ids)
    made.save_pretrained(tmp_path)  # PEFT puts the head's base weight beside the slices
    made.load_adapter(str(tmp_path), adapter_name="again")
    made.set_adapter("again")
    assert torch.equal(logits(made, ids), expected)


class TestReadingTheBase:
    """What reads base weights reads their own values, or is refused."""

    @pytest.mark.parametrize("change", ["merge", "switch"])
    def test_channels_are_chosen_by_the_bases_own_weights(self, change: str) -> None:
        base, config = build("llama"), S2FTConfig(ratios={"o_proj": 0.5, "down_proj": 0.3}, strategy="weight")
        expected = s2ft.select(base, config).config.slices
        made = get_peft_model(base, S2FTConfig(ratios={"o_proj": 1.0, "down_proj": 1.0}), adapter_name="b").eval()
        for layer in layers(made):
            nn.init.normal_(layer.s2ft_block["b"].weight)
        merged(made) if change == "merge" else switched(made)
        before = logits(made, ids := tokens(2, 7))
        assert s2ft.select(made, config).config.slices == expected
        assert torch.equal(logits(made, ids), before)
        made.add_adapter("c", config)
        assert config.slices == made.peft_config["c"].slices == expected

    def test_no_channels_are_chosen_inside_in_place(self) -> None:
        made = model()
        with s2ft.in_place(made), pytest.raises(S2FTError, match="choosing channels is not possible inside"):
            s2ft.select(made, S2FTConfig(ratios=0.3))

    @pytest.mark.parametrize("change", ["merge", "switch"])
    def test_a_pool_brings_nothing_meanwhile(self, change: str, tmp_path: Path) -> None:
        base = build("llama", torch.float32)
        saved = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=0.3, seed=3), adapter_name="alice")
        saved.save_pretrained(tmp_path)
        made = get_peft_model(base, S2FTConfig(ratios=0.3, seed=3, init_weights=False), adapter_name="b").eval()
        pool = AdapterPool(made, str(tmp_path), device_bytes=1 << 24, host_bytes=0)
        undo = merged(made) if change == "merge" else switched(made)
        with pytest.raises(S2FTError, match="bringing the adapter 'alice' is not possible while"):
            pool.bring(["alice"])
        undo()
        pool.bring(["alice"])


def test_an_adapter_that_keeps_a_module_whole_is_merged_while_it_is_active() -> None:
    made, ids = model(), tokens(2, 7)
    made.add_adapter("c", S2FTConfig(ratios=0.3, init_weights=False, modules_to_save=["lm_head"]))
    expected = logits(made, ids)
    with pytest.raises(
        S2FTError, match="lm_head is kept whole by the adapter 'c', and the active adapter's is what runs"
    ):
        made.merge_adapter(["c"])
    assert torch.equal(logits(made, ids), expected)
    made.merge_adapter(["default"])
    torch.testing.assert_close(logits(made, ids), expected)
    made.set_adapter("c")
    nn.init.normal_(made.get_base_model().lm_head.modules_to_save["c"].weight)
    expected = logits(made, ids)
    with pytest.raises(S2FTError, match="kept whole"):
        made.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(logits(made.merge_and_unload(), ids), expected)


KEPT = ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 9]})


@pytest.mark.parametrize("kept", KEPT, ids=["module", "rows"])
def test_rows_of_a_batch_whose_adapter_keeps_no_module_run_the_bases(kept: dict[str, Any]) -> None:
    made, ids = model(), torch.tensor([[5, 9, 11]]).expand(3, -1)
    made.add_adapter("c", S2FTConfig(ratios=0.3, init_weights=False, **kept))
    expected = {"__base__": base_output(made, ids)}
    for name in ("b", "c"):
        made.set_adapter(name)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1 if parameter.requires_grad else 0)
        expected[name] = logits(made, ids)
    names = ["b", "__base__", "c"]
    for active in ("c", "b"):
        made.set_adapter(active)
        found = logits(made, ids, adapter_names=names)
        torch.testing.assert_close(found, torch.stack([expected[name][0] for name in names]))


class TestTokenRows:
    """Rows of the embedding are merged, unmerged and taken out with the slices."""

    ids = torch.tensor([[5, 7, 9, 3]])

    def made(self, active: str = "x") -> PeftModel:
        """ "x" and "y" have rows, "c" has none."""
        made = get_peft_model(build("llama"), self.config([5], seed=1), "x")
        made.add_adapter("y", self.config([7], seed=2))
        made.add_adapter("c", self.config(None, seed=3))
        for delta in self.rows(made).trainable_tokens_delta.values():
            nn.init.normal_(delta)
        made.set_adapter(active)
        return made.eval()

    def config(self, rows: list[int] | None, seed: int) -> S2FTConfig:
        return S2FTConfig(ratios=0.3, init_weights=False, seed=seed, trainable_token_indices=rows)

    def rows(self, made: PeftModel) -> Any:
        return made.get_base_model().model.embed_tokens.token_adapter

    def outputs(self, made: PeftModel) -> dict[str, Tensor]:
        found = {"": base_output(made, self.ids)}
        for name in ("c", "y", "x"):
            made.set_adapter(name)
            found[name] = logits(made, self.ids)
        return found

    def test_another_adapter_takes_their_place(self) -> None:
        made = self.made()
        own, expected = self.rows(made).weight.clone(), self.outputs(made)
        for name in ("y", "c"):
            made.merge_adapter()
            torch.testing.assert_close(logits(made, self.ids), expected["x"])
            made.set_adapter(name)
            assert torch.equal(self.rows(made).weight, own)
            assert torch.equal(logits(made, self.ids), expected[name])
            made.set_adapter("x")

    @pytest.mark.parametrize(("active", "names"), [("c", ["x"]), ("y", ["x"]), ("x", ["c"]), ("c", ["c", "y"])])
    def test_a_merge_that_would_run_others_is_refused_by_name(self, active: str, names: list[str]) -> None:
        made = self.made(active)
        before = logits(made, self.ids)
        for merge in (made.merge_adapter, made.merge_and_unload):
            with pytest.raises(
                S2FTError, match=r"embed_tokens is trained in some rows by the adapter '[xy]', and the act"
            ):
                merge(adapter_names=names)
        assert torch.equal(logits(made, self.ids), before)

    def test_rows_of_two_adapters_stand_in_the_weight_together(self) -> None:
        made = self.made()
        own, expected = self.rows(made).weight.clone(), {}
        for name, row in (("x", 5), ("y", 7)):
            made.set_adapter(name)
            made.merge_adapter()
            expected[row] = self.rows(made).weight[row].clone()
            made.unmerge_adapter()
        made.set_adapter("x")
        made.merge_adapter(["x", "y"])
        for row in range(len(own)):
            assert torch.equal(self.rows(made).weight[row], expected.get(row, own[row]))
        made.unmerge_adapter()
        assert torch.equal(self.rows(made).weight, own)
        made.merge_adapter(["x"])
        made.merge_adapter(["y"])
        assert torch.equal(self.rows(made).weight[7], expected[7])

    def test_an_adapter_without_rows_is_merged_beside_one_with_them(self) -> None:
        made = self.made()
        made.base_model.set_adapter(["x", "c"])
        own, expected = self.rows(made).weight.clone(), logits(made, self.ids)
        made.merge_adapter(["x"])
        made.merge_adapter(["c"])
        torch.testing.assert_close(logits(made, self.ids), expected)
        made.unmerge_adapter()
        assert torch.equal(self.rows(made).weight, own)
        assert torch.equal(logits(made, self.ids), expected)
        plain = made.merge_and_unload(adapter_names=["x", "c"])
        torch.testing.assert_close(logits(plain, self.ids), expected)

    def test_a_merge_that_fails_leaves_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = self.made()
        own, expected = self.rows(made).weight.clone(), logits(made, self.ids)

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        for at in (S2FTLinear, type(self.rows(made))):
            with monkeypatch.context() as patch:
                patch.setattr(at, "merge", lambda *_, **__: fail())
                with pytest.raises(KeyboardInterrupt):
                    made.merge_adapter()
            assert torch.equal(self.rows(made).weight, own)
            assert torch.equal(logits(made, self.ids), expected)
        self.rows(made).trainable_tokens_delta["x"].data[0, 0] = torch.nan
        with pytest.raises(S2FTError, match=r"embed_tokens.*NaNs detected"):
            made.merge_adapter(safe_merge=True)
        assert not made.get_model_status().merged_adapters

    def test_disabling_takes_them_out_and_enabling_brings_them_back(self) -> None:
        made = self.made()
        own, expected = self.rows(made).weight.clone(), self.outputs(made)
        made.merge_adapter()
        merged = self.rows(made).weight.clone()
        for _ in range(2):
            with made.disable_adapter():
                assert torch.equal(self.rows(made).weight, own)
                assert torch.equal(base_output(made, self.ids), expected[""])
            assert torch.equal(self.rows(made).weight, merged)
        made.unmerge_adapter()
        with made.disable_adapter():
            made.merge_adapter()
            assert torch.equal(logits(made, self.ids), expected[""])
        assert torch.equal(self.rows(made).weight, merged)

    def test_rows_that_are_added_meanwhile_start_from_the_bases(self) -> None:
        made = self.made()
        own = self.rows(made).weight.clone()
        made.merge_adapter()
        merged = self.rows(made).weight.clone()
        made.add_adapter("z", self.config([5, 6], seed=4))
        assert torch.equal(self.rows(made).trainable_tokens_delta["z"], own[[5, 6]])
        assert torch.equal(self.rows(made).weight, merged)

    def test_rows_that_are_loaded_anew_meanwhile_are_merged_anew(self) -> None:
        made = self.made()
        own, state = self.rows(made).weight.clone(), get_peft_model_state_dict(made, adapter_name="x")
        doubled = {name: 2 * value if value.is_floating_point() else value for name, value in state.items()}
        twin = copy.deepcopy(made)
        set_peft_model_state_dict(twin, doubled, adapter_name="x")
        made.merge_adapter()
        set_peft_model_state_dict(made, doubled, adapter_name="x")
        torch.testing.assert_close(logits(made, self.ids), logits(twin, self.ids))
        made.unmerge_adapter()
        assert torch.equal(self.rows(made).weight, own)

    def test_deleting_the_active_adapter_activates_no_others_rows(self) -> None:
        made = self.made()
        expected = self.outputs(made)["c"]
        made.delete_adapter("x")
        assert made.active_adapters == ["c"]
        assert torch.equal(logits(made, self.ids), expected)


class TestSharedWeights:
    """What another module reads is left to it."""

    def tied(self) -> PeftModel:
        base = build("llama-mqa", torch.float32)
        assert base.lm_head.weight is base.model.embed_tokens.weight
        config = S2FTConfig(ratios=0.4, target_modules=["lm_head", "down_proj"], init_weights=False)
        made = get_peft_model(base, config).eval()
        nn.init.normal_(made.get_base_model().lm_head.s2ft_block["default"].weight)
        return made

    @pytest.mark.parametrize("change", ["merge", "switch"])
    def test_a_tied_head_changes_without_its_embedding(self, change: str) -> None:
        made, ids = self.tied(), tokens(2, 7)
        embedding = made.get_base_model().model.embed_tokens.weight
        before, expected = embedding.clone(), logits(made, ids)
        assert not torch.allclose(base_output(made, ids), expected, rtol=1e-2, atol=1e-2)
        made.merge_adapter() if change == "merge" else s2ft.switch(made, "default")
        torch.testing.assert_close(logits(made, ids), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(embedding, before)
        made.to(torch.bfloat16)
        made.unmerge_adapter() if change == "merge" else s2ft.switch(made, None)
        assert made.get_base_model().lm_head.weight is made.get_base_model().model.embed_tokens.weight
        assert torch.equal(embedding, before.bfloat16())

    def test_the_merged_model_is_untied_and_says_so(self, tmp_path: Path) -> None:
        made, ids = self.tied(), tokens(2, 7)
        expected = logits(made, ids)
        with pytest.warns(UserWarning, match="no longer tied"):
            merged = made.merge_and_unload()
        torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path)
        torch.testing.assert_close(
            logits(type(merged).from_pretrained(tmp_path).eval(), ids), expected, rtol=1e-4, atol=1e-4
        )

    def test_two_layers_with_one_weight(self) -> None:
        pair = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
        pair[1].weight = pair[0].weight
        before, x = pair[0].weight.detach().clone(), torch.randn(4, 6)
        made = get_peft_model(pair, S2FTConfig(ratios=None, budget=0.9, target_modules=["0", "1"])).eval()
        for layer in layers(made):
            nn.init.normal_(layer.s2ft_block["default"].weight)
        expected = made(x)
        made.merge_adapter()
        torch.testing.assert_close(made(x), expected)
        twin = copy.deepcopy(made)
        for one in (made, twin):
            one.to(torch.float64).to(torch.float32)
            one.unmerge_adapter()
            first, second = layers(one)
            assert first.weight is second.weight
            assert torch.equal(first.weight, before)


class TestQuantisedWeights:
    def coded(self, path: Path) -> tuple[PeftModel, nn.Module]:
        base = build("llama", torch.float32)
        plain = copy.deepcopy(base)
        stand_in(base, levels=127)
        made = get_peft_model(base, S2FTConfig(ratios={"down_proj": 0.3}, init_weights=False)).eval()
        made.save_pretrained(path)
        return made, plain

    def test_they_are_not_written_into(self, tmp_path: Path) -> None:
        made, plain = self.coded(tmp_path)
        ids = tokens(2, 7)
        expected = logits(made, ids)
        made(ids, labels=ids).loss.backward()
        with s2ft.in_place(made) as layout:
            assert {place.how for place in layout.placements} == {"added"}
            torch.testing.assert_close(logits(made, ids), expected)
        on_plain = PeftModel.from_pretrained(plain, tmp_path)
        torch.testing.assert_close(logits(on_plain, ids), expected, rtol=0.2, atol=0.2)

    def test_the_delta_has_the_shape_of_the_values_where_they_are_packed(self) -> None:
        layer = S2FTLinear(nn.Linear(9, 8), "a", Slice.parse("in 1,4-5"), init_weights=False)
        expected = layer.get_delta_weight("a")
        layer.base_layer.weight = nn.Parameter(torch.zeros(36, 1, dtype=torch.uint8), requires_grad=False)
        assert torch.equal(layer.get_delta_weight("a"), expected)
        assert torch.equal(expected[:, [1, 4, 5]], layer.s2ft_block["a"].weight)
        with pytest.raises(S2FTError, match="adapter 'z' has no slice of this layer; it has a"):
            layer.get_delta_weight("z")


@pytest.mark.parametrize(
    ("shape", "dtype", "attribute", "reason"),
    [
        ((0,), torch.float32, "ds_id", "is partitioned by DeepSpeed ZeRO-3"),
        ((36, 1), torch.bfloat16, "quant_state", "is quantised (Linear), stored as torch.bfloat16"),
        ((8, 9), torch.float8_e4m3fn, None, "is quantised (Linear), stored as torch.float8_e4m3fn"),
        ((8, 9), torch.int8, None, "is quantised (Linear), stored as torch.int8"),
        ((40,), torch.float32, None, "holds 40 of its values only (partitioned, as by FSDP, or packed)"),
        ((8, 9), torch.float16, None, None),
    ],
)
def test_a_weight_that_is_not_plain_is_named(
    shape: tuple[int, ...], dtype: torch.dtype, attribute: str | None, reason: str | None
) -> None:
    linear = nn.Linear(9, 8)
    linear.weight = nn.Parameter(torch.zeros(shape).to(dtype), requires_grad=False)
    if attribute:
        setattr(linear.weight, attribute, 1)
    assert why_not_plain(linear) == reason


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One process that shards over itself."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_sharded_weights_are_not_permuted(mesh: Any) -> None:
    config = S2FTConfig(ratios={"o_proj": 0.5, "down_proj": 0.3}, init_weights=False)
    made, ids = get_peft_model(build("mistral", torch.float32), config), tokens(2, 5)
    layer = layers(made)[0]
    expected = layer.get_delta_weight("default")
    fully_shard(made, mesh=mesh)
    made(ids, labels=ids).loss.backward()
    assert torch.equal(layer.get_delta_weight("default"), expected)
    with s2ft.in_place(made) as layout:
        assert {place.how for place in layout.placements} == {"added"}
        made(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_sharding_a_model_that_is_in_place_is_refused_at_the_first_pass(mesh: Any, is_compiled: bool) -> None:
    """FSDP2 shows a pass whole weights, as plain parameters, so nothing but the parameter itself tells."""
    if is_compiled and Version(torch.__version__) < Version("2.13"):
        pytest.skip("the compiler raises an error of its own instead")
    config = S2FTConfig(ratios={"o_proj": 0.5, "down_proj": 0.3}, init_weights=False)
    made, ids = get_peft_model(build("mistral", torch.float32), config), tokens(2, 5)
    layout = enter(made)
    fully_shard(made, mesh=mesh)
    with pytest.raises(S2FTError, match=r"inside `s2ft\.in_place\(model\)`.*shard or quantise the model first"):
        (torch.compile(made, backend="eager") if is_compiled else made)(ids, labels=ids)
    with pytest.raises(
        S2FTError, match="base weights could not all be restored, so load the model anew: a base weight has"
    ):
        layout.leave()
    assert not any(layer.layout for layer in layers(made))


def test_an_adapter_that_cannot_be_added_leaves_a_merged_model_merged(tmp_path: Path) -> None:
    made, ids = model(), tokens(2, 7)
    get_peft_model(build("llama", torch.float64), S2FTConfig(ratios=0.3, seed=1)).save_pretrained(tmp_path)
    made.merge_adapter(["b"])
    expected = logits(made, ids)
    with pytest.raises(S2FTError, match="another base"):  # though its channels are those that hold the merged values
        made.load_adapter(str(tmp_path), adapter_name="c")
    assert torch.equal(logits(made, ids), expected)
    assert made.get_model_status().merged_adapters == ["b"]


def test_a_merge_that_fails_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made, ids = model(), tokens(2, 7)
    own, expected = made.state_dict(), logits(made, ids)
    own = {name: value.clone() for name, value in own.items()}
    settle, count = S2FTLinear.settle, iter(range(10**6))

    def fail(self: S2FTLinear) -> None:
        if next(count) == 4:
            raise KeyboardInterrupt
        settle(self)

    for merging in (made.merge_adapter, made.merge_and_unload):
        with monkeypatch.context() as patch:
            patch.setattr(S2FTLinear, "settle", fail)
            with pytest.raises(KeyboardInterrupt):
                merging()
        count = iter(range(-6, 10**6))
        assert all(torch.equal(value, own[name]) for name, value in made.state_dict().items())
        assert torch.equal(logits(made, ids), expected)


def test_plain_modules_keep_loading_state_dicts() -> None:
    made = model()
    assert isinstance(made, nn.Module)
    assert not made.load_state_dict(made.state_dict()).missing_keys


def on_the_cpu(made: PeftModel, folder: Path) -> None:
    cpu_offload(made, execution_device=torch.device("cpu"))


def on_disk(made: PeftModel, folder: Path) -> None:
    disk_offload(made, folder, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [on_the_cpu, on_disk])
def test_a_base_that_accelerate_has_offloaded_is_merged_into_and_given_back(
    offload: Callable[[PeftModel, Path], None], tmp_path: Path
) -> None:
    made, ids = model(), tokens(2, 7)
    alone, base = logits(made, ids), base_output(made, ids)
    together = copy.deepcopy(made)
    together.merge_adapter(["default", "b"])
    both = logits(together, ids)
    offload(made, tmp_path)
    assert all(layer.weight.is_meta for layer in layers(made))
    made.merge_adapter(["default", "b"])
    torch.testing.assert_close(logits(made, ids), both)
    assert torch.equal(base_output(made, ids), base)
    torch.testing.assert_close(logits(made, ids), both)
    made.unmerge_adapter()
    assert torch.equal(logits(made, ids), alone)
    torch.testing.assert_close(logits(made.merge_and_unload(), ids), alone)


def test_layers_of_an_offloaded_base_are_merged_one_by_one_and_not_where_the_result_is_not_finite() -> None:
    made, ids = model(), tokens(2, 7)
    alone, twin = logits(made, ids), copy.deepcopy(made)
    on_the_cpu(made, Path())
    last = layers(made)[-1]
    for each in (last, layers(twin)[-1]):
        each.merge(safe_merge=True)
    assert last.weight.is_meta
    torch.testing.assert_close(logits(made, ids), logits(twin, ids))
    last.unmerge()
    made.set_adapter("b")
    with torch.no_grad():
        last.block("b")._hf_hook.weights_map["weight"][0, 0] = torch.nan
    with pytest.raises(S2FTError, match="NaNs detected"):
        made.merge_adapter(safe_merge=True)
    made.set_adapter("default")
    assert torch.equal(logits(made, ids), alone)
