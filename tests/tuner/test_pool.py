"""The pool of adapters: what rows it gives, what it holds where, and what it refuses."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from families import build, tokens
from live import layers, logits
from s2ft import S2FTConfig, S2FTError
from s2ft.layer import pack
from s2ft.tuner import pool as module
from s2ft.tuner.pool import AdapterPool

RATIOS = {"q_proj": 0.5, "o_proj": 0.5, "down_proj": 0.3}
NAMES = [f"user{number}" for number in range(6)]
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A base model, and a folder of adapters for it; they differ in rank, and user5 has modules that no other has."""
    base, root = build("llama", torch.float64), tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(NAMES):
        ratios = {"up_proj": 0.2} if name == "user5" else {**RATIOS, "down_proj": 0.1 * (number + 1)}
        config = S2FTConfig(ratios=ratios, seed=number, init_weights=False)
        get_peft_model(copy.deepcopy(base), config, adapter_name=name).save_pretrained(root)
    return base, root


@pytest.fixture
def model(saved: tuple[nn.Module, Path]) -> Any:
    config = S2FTConfig(ratios=RATIOS, seed=9, init_weights=False)
    return get_peft_model(copy.deepcopy(saved[0]), config, adapter_name="own").eval()


def size(root: Path, *names: str) -> int:
    return sum((root / name / "adapter_model.safetensors").stat().st_size for name in names)


def tiers(pool: AdapterPool) -> dict[str, list[str]]:
    return {tier: [name for name in pool if pool.tier(name) == tier] for tier in ("device", "host", "disk")}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The adapters read from the disk, in order."""
    names: list[str] = []
    original = module.read_adapter
    monkeypatch.setattr(module, "read_adapter", lambda folder: names.append(Path(folder).name) or original(folder))
    return names


def test_rows_are_those_of_each_adapter_by_itself(saved: tuple[nn.Module, Path], model: Any) -> None:
    base, root = saved
    pool, ids = AdapterPool(model, root, PLENTY, PLENTY), tokens(8, 5)
    names = ["user3", "__base__", "user0", "own", "user5", "user1", "user3", "user2"]
    found = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name == "own":
            wanted = logits(model, ids)
        elif name == "__base__":
            wanted = logits(base, ids)
        else:
            wanted = logits(PeftModel.from_pretrained(copy.deepcopy(base), root / name), ids)
        torch.testing.assert_close(found[row], wanted[row])
    assert tiers(pool)["device"] == ["user0", "user1", "user2", "user3", "user5"]
    plain = logits(model, ids)
    pool.close()
    assert torch.equal(logits(model, ids), plain)
    with pytest.raises(ValueError, match=r"non-existing.*user3"):
        logits(model, ids, adapter_names=names)


def test_generates_with_beams(saved: tuple[nn.Module, Path], model: Any) -> None:
    AdapterPool(model, saved[1], PLENTY, 0)
    ids, options = tokens(2, 4), {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=["user1", "user4"], **options)
    for row, name in enumerate(["user1", "user4"]):
        alone = PeftModel.from_pretrained(copy.deepcopy(saved[0]), saved[1] / name)
        assert torch.equal(mixed[row], alone.generate(input_ids=ids, **options)[row])


def test_least_recently_used_leaves_first(saved: tuple[nn.Module, Path], model: Any, reads: list[str]) -> None:
    root = saved[1]
    room = size(root, "user3", "user4")
    pool = AdapterPool(model, root, device_bytes=room, host_bytes=size(root, "user2"))
    pool.bring(["user0"])
    pool.bring(["user1"])
    pool.bring(["user0"])  # used again: user1 is the oldest now
    pool.bring(["user4"])
    assert tiers(pool) == {"device": ["user0", "user4"], "host": ["user1"], "disk": ["user2", "user3", "user5"]}
    pool.bring(["user1"])  # user0 goes to the host, or nowhere: the host has room for one
    assert reads == ["user0", "user1", "user4"]
    assert tiers(pool)["device"] == ["user1", "user4"]
    assert tiers(pool)["host"] == ["user0"]
    pool.bring(["user3", "user4"])
    assert tiers(pool) == {"device": ["user3", "user4"], "host": ["user1"], "disk": ["user0", "user2", "user5"]}
    assert reads == ["user0", "user1", "user4", "user3"]


def test_stays_within_its_bytes_and_keeps_what_the_batch_needs(saved: tuple[nn.Module, Path], model: Any) -> None:
    root, ids = saved[1], tokens(2, 3)
    room, aside = size(root, "user3", "user4"), size(root, "user4") + size(root, "user0") // 2
    roomy = copy.deepcopy(model)
    pool, _ = AdapterPool(model, root, room, aside), AdapterPool(roomy, root, PLENTY, PLENTY)
    for _ in range(12):
        pair = [NAMES[number] for number in torch.randint(len(NAMES), (2,)).tolist()]
        found = logits(model, ids, adapter_names=pair)
        assert {pool.tier(name) for name in pair} == {"device"}
        assert pool.used()[0] <= room
        assert pool.used()[1] <= aside
        torch.testing.assert_close(found, logits(roomy, ids, adapter_names=pair))
        for tier, used in zip(("device", "host"), pool.used(), strict=True):
            assert size(root, *tiers(pool)[tier]) == used


@pytest.mark.slow
def test_a_thousand_adapters_in_one_batch(saved: tuple[nn.Module, Path], model: Any) -> None:
    root = saved[1]
    pool = AdapterPool(model, {f"{number}": root / NAMES[number % 6] for number in range(1000)}, PLENTY, 0)
    ids = tokens(1, 3).expand(1000, -1)
    found = logits(model, ids, adapter_names=[str(number) for number in range(1000)])
    assert set(map(pool.tier, pool)) == {"device"}
    for number, name in enumerate(NAMES):
        alone = logits(PeftModel.from_pretrained(copy.deepcopy(saved[0]), root / name), ids[:1])[0]
        torch.testing.assert_close(found[number::6], alone.expand(len(found[number::6]), -1, -1))


def test_a_batch_that_does_not_fit_changes_nothing(saved: tuple[nn.Module, Path], model: Any) -> None:
    root = saved[1]
    room = size(root, "user0", "user1")
    pool = AdapterPool(model, root, room, PLENTY)
    pool.bring(["user0"])
    before = tiers(pool)
    needed = size(root, "user0", "user1", "user2")
    with pytest.raises(S2FTError, match=rf"3 adapters of together {needed:,} bytes; device_bytes={room:,}"):
        logits(model, tokens(4, 3), adapter_names=["user0", "user1", "user2", "user0"])
    assert tiers(pool) == before


class TestRefused:
    def test_bad_adapters(self, saved: tuple[nn.Module, Path], model: Any, tmp_path: Path) -> None:
        import shutil

        base, root = saved
        for name in ("good", "truncated", "foreign"):
            shutil.copytree(root / "user0", tmp_path / name)
        weights = tmp_path / "truncated" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        other = build("llama", torch.float64)
        config = S2FTConfig(ratios=RATIOS, seed=3, init_weights=False)
        get_peft_model(other, config, adapter_name="elsewhere").save_pretrained(tmp_path)
        config = S2FTConfig(ratios=RATIOS, seed=3, init_weights=False, modules_to_save=["lm_head"])
        get_peft_model(copy.deepcopy(base), config, adapter_name="head").save_pretrained(tmp_path)
        lora = tmp_path / "foreign" / "adapter_config.json"
        lora.write_text(lora.read_text().replace('"S2FT"', '"LORA"'))
        pool, ids = AdapterPool(model, tmp_path, PLENTY, PLENTY), tokens(2, 3)
        before = logits(model, ids)
        for name, message in {
            "truncated": "truncated",
            "foreign": "not an S2FT adapter: its peft_type is 'LORA'",
            "elsewhere": "base",
            "head": "lm_head.*load_adapter",
        }.items():
            with pytest.raises(S2FTError, match=message):
                logits(model, ids, adapter_names=["good", name])
            assert pool.tier(name) == "disk"
        assert torch.equal(logits(model, ids), before)
        assert logits(model, ids, adapter_names=["good", "own"]).isfinite().all()

    def test_bad_arguments(self, saved: tuple[nn.Module, Path], model: Any, tmp_path: Path) -> None:
        root = saved[1]
        with pytest.raises(S2FTError, match=r"PEFT model with an S2FT adapter; got LlamaForCausalLM"):
            AdapterPool(saved[0], root, 1, 1)
        with pytest.raises(S2FTError, match="holds no adapter folders"):
            AdapterPool(model, tmp_path, 1, 1)
        with pytest.raises(
            S2FTError, match=r"(?s)device_bytes=0 .*host_bytes=1\.5 .*'own' is taken.*no adapter_config"
        ):
            AdapterPool(model, {"own": root / "user0", "b": tmp_path}, 0, 1.5)  # type: ignore[arg-type]
        with pytest.raises(S2FTError, match="'__base__' is taken"):
            AdapterPool(model, {"__base__": root / "user0"}, 1, 1)
        AdapterPool(model, root, PLENTY, 0)
        with pytest.raises(S2FTError, match="has a pool already"):
            AdapterPool(model, root, PLENTY, 0)


def test_a_wrapped_layer_is_the_base_until_it_is_given_an_adapter(model: Any) -> None:
    tuner, x = model.base_model, tokens(2, 5)
    path = "model.layers.0.mlp.gate_proj"
    plain = tuner.model.get_submodule(path)
    before = logits(model, x)
    layer = tuner.wrap(path)
    assert tuner.wrap(path) is layer
    assert layer.base_layer is plain
    assert layer.active_adapters == tuner.active_adapters
    assert not layer.s2ft_block
    assert torch.equal(logits(model, x), before)
    with pytest.raises(S2FTError, match="RotaryEmbedding is no linear layer"):
        tuner.wrap("model.rotary_emb")
    assert model.unload().get_submodule(path) is plain


def tables_of(model: Any) -> list[torch.Tensor]:
    """The packed slices of the last mixed batch, of all layers."""
    return [one.table for layer in layers(model) if layer in pack._tables for one in pack._tables[layer][1]]


def close(model: Any, pool: AdapterPool) -> None:
    pool.close()


def delete(model: Any, pool: AdapterPool) -> None:
    model.delete_adapter("own")


@pytest.mark.parametrize("leave", [close, delete])
def test_what_leaves_takes_its_tables_along(
    saved: tuple[nn.Module, Path], model: Any, leave: Callable[[Any, AdapterPool], None]
) -> None:
    pool, ids = AdapterPool(model, saved[1], PLENTY, PLENTY), tokens(2, 5)
    logits(model, ids, adapter_names=["user1", "own"])
    layer = model.base_model.model.model.layers[0].mlp.down_proj  # which both have a slice of
    table = weakref.ref(pack._tables[layer][1][0].table)
    leave(model, pool)
    gc.collect()
    assert table() is None


def test_adapters_come_and_go(saved: tuple[nn.Module, Path], model: Any) -> None:
    base, root = saved
    pool, ids = AdapterPool(model, {}, PLENTY, PLENTY), tokens(2, 5)
    pool.add("mine", root / "user3")
    assert pool.size(["mine"]) == size(root, "user3")
    found = logits(model, ids, adapter_names=["mine", "__base__"])
    wanted = logits(PeftModel.from_pretrained(copy.deepcopy(base), root / "user3"), ids)
    torch.testing.assert_close(found[0], wanted[0])
    for name, folder, said in (
        ("mine", root / "user1", "taken"),
        ("own", root / "user1", "taken"),
        ("new", root, "no adapter"),
    ):
        with pytest.raises(S2FTError, match=said):
            pool.add(name, folder)
    tables = [weakref.ref(table) for table in tables_of(model)]
    assert tables
    pool.remove("mine")
    gc.collect()
    assert not any(table() is not None for table in tables)
    assert pool.used() == (0, 0)
    with pytest.raises(ValueError, match="non-existing"):
        logits(model, ids, adapter_names=["mine", "mine"])
    with pytest.raises(S2FTError, match="the pool has no adapter 'mine'; it has none"):
        pool.remove("mine")
    pool.add("mine", root / "user1")
    wanted = logits(PeftModel.from_pretrained(copy.deepcopy(base), root / "user1"), ids)
    torch.testing.assert_close(logits(model, ids, adapter_names=["mine", "mine"]), wanted)
