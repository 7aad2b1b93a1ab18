"""The vLLM plug-in against a stand-in for vLLM; `make test-engines` runs it in the real server."""

import asyncio
import json
import os
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from safetensors.torch import load_file

import s2ft
from adapter_files import WEIGHTS, write_tensors
from exported import SIDES, save_adapter, save_base
from s2ft import S2FTError
from s2ft.exports.vllm_plugin import ROOT, adapter_folder, register


class Registry(dict):
    """As vLLM's: resolvers by name."""

    def get_supported_resolvers(self) -> set[str]:
        return set(self)

    def register_resolver(self, name: str, resolver: Any) -> None:
        assert name not in self
        self[name] = resolver


class Manager:
    """As vLLM's: of a model whose q, k and v are one layer."""

    modules: ClassVar = {"model.layers.0.self_attn.qkv_proj": None, "model.layers.0.self_attn.o_proj": None}
    packed_modules: ClassVar = {
        "model.layers.0.self_attn.qkv_proj": [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    }

    def add_adapter(self, lora: Any) -> bool:
        return True


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    found = Registry()
    request, resolver = ModuleType("vllm.lora.request"), ModuleType("vllm.lora.resolver")
    managers, distributed = ModuleType("vllm.lora.model_manager"), ModuleType("vllm.distributed")
    managers.LoRAModelManager, managers.LRUCacheLoRAModelManager = type("M", (Manager,), {}), type("L", (Manager,), {})
    distributed.get_pp_group = lambda: SimpleNamespace(world_size=1)
    request.LoRARequest = SimpleNamespace
    resolver.LoRAResolver, resolver.LoRAResolverRegistry = object, found
    modules = {"vllm": ModuleType("vllm"), "vllm.lora": ModuleType("vllm.lora")}
    for name, module in {
        **modules,
        "vllm.lora.request": request,
        "vllm.lora.resolver": resolver,
        "vllm.lora.model_manager": managers,
        "vllm.distributed": distributed,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "adapters").mkdir()
    monkeypatch.setenv(ROOT, str(tmp_path / "adapters"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def resolve(registry: Registry, base: Path, name: str) -> Any:
    register()
    return asyncio.run(registry["S2FT"].resolve_lora(str(base), name))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_entry_point_is_registered_once_and_only_when_asked(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["s2ft"].partition(":")
    entry = getattr(import_module(module), name)
    monkeypatch.delenv(ROOT)
    entry()
    assert not registry
    monkeypatch.setenv(ROOT, os.devnull)
    with pytest.raises(S2FTError, match=f"{ROOT}='{os.devnull}' is not a folder"):
        entry()
    monkeypatch.setenv(ROOT, str(Path(__file__).parent))
    entry()
    entry()
    assert set(registry) == {"S2FT"}


def test_a_native_folder_becomes_the_exported_lora(registry: Registry, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    native = save_adapter(tmp_path / "adapters" / "team" / "math", base, SIDES["both"])
    answer = resolve(registry, base, "team/math")
    s2ft.export(native, "vllm", tmp_path / "lora")
    assert files(Path(answer.lora_path)) == files(tmp_path / "lora")
    assert answer.lora_name == "team/math"
    assert answer.lora_int_id >= 1


def test_the_cache_is_used_until_the_adapter_changes(registry: Registry, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    native = save_adapter(tmp_path / "adapters" / "math", base, 0.3)
    first = Path(resolve(registry, base, "math").lora_path)
    written = (first / WEIGHTS).stat().st_mtime_ns
    assert Path(resolve(registry, base, "math").lora_path) == first
    assert (first / WEIGHTS).stat().st_mtime_ns == written
    tensors = load_file(native / WEIGHTS)
    next(tensor for name, tensor in tensors.items() if name.endswith("weight")).mul_(2)
    write_tensors(native, tensors)
    second = Path(resolve(registry, base, "math").lora_path)
    assert second != first
    assert files(second)[WEIGHTS] != files(first)[WEIGHTS]
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, second.name])


def test_a_cached_conversion_is_not_for_another_base_of_that_name(registry: Registry, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    save_adapter(tmp_path / "adapters" / "math", base, 0.3)
    resolve(registry, base, "math")
    save_base(base, "llama")
    with pytest.raises(S2FTError, match="made for another base"):
        resolve(registry, base, "math")


def test_another_version_converts_anew(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", "llama")
    save_adapter(tmp_path / "adapters" / "math", base, 0.3)
    first = resolve(registry, base, "math").lora_path
    monkeypatch.setattr("s2ft.exports.vllm_plugin.version", lambda package: "0.0.0")
    assert resolve(registry, base, "math").lora_path != first


def test_names_that_lead_elsewhere_are_not_there(registry: Registry, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    save_adapter(tmp_path / "secret", base, 0.3)
    inside = save_adapter(tmp_path / "adapters" / "a", base, 0.3)
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "adapters" / "lora").mkdir()
    (tmp_path / "adapters" / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    elsewhere = ["../secret", str(tmp_path / "secret"), str(inside), "a/../../secret", "a/..", "..", "", "link", "a\0"]
    for name in [*elsewhere, "lora", "nothing", "a/adapter_config.json"]:
        assert resolve(registry, base, name) is None, name
        assert adapter_folder(tmp_path / "adapters", name) is None
    assert adapter_folder(tmp_path / "adapters", "a") == inside.resolve()


def test_no_name_and_no_config_brings_the_server_down(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name, text in (("deep", '{"a":' * 50_000), ("digits", '{"peft_type": "S2FT", "seed": ' + "9" * 5000 + "}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(text)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "adapter_config.json")
    for name in ("loop", "loop/a", "\ud800", "a\udcff", "x" * 5000, "\x1b[2J", "deep", "digits", "pipe"):
        assert adapter_folder(tmp_path, name) is None


def test_what_cannot_be_served_says_why_and_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    base, other = save_base(tmp_path / "base", "llama"), save_base(tmp_path / "other", "llama")
    native = save_adapter(tmp_path / "adapters" / "math", base, 0.3)
    with pytest.raises(S2FTError, match="made for another base"):
        resolve(registry, other, "math")
    (native / WEIGHTS).write_bytes((native / WEIGHTS).read_bytes()[:-20])
    with pytest.raises(S2FTError, match="truncated"):
        resolve(registry, base, "math")
    (native / WEIGHTS).unlink()
    with pytest.raises(S2FTError, match="no whole adapter"):
        resolve(registry, base, "math")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_lora_whose_modules_the_engine_does_not_have_is_refused(registry: Registry) -> None:
    register()
    register()
    managers = sys.modules["vllm.lora.model_manager"]
    for kind in (managers.LoRAModelManager, managers.LRUCacheLoRAModelManager):
        names = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "o_proj")]
        assert kind().add_adapter(SimpleNamespace(loras=dict.fromkeys([*names, "lm_head"])))
        with pytest.raises(ValueError, match=r"has no language_model\.model\.layers.*would answer as the base"):
            kind().add_adapter(
                SimpleNamespace(loras=dict.fromkeys(["language_model.model.layers.0.self_attn.q_proj", *names]))
            )


def test_an_adapter_that_changes_nothing_is_refused(registry: Registry, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    save_adapter(tmp_path / "adapters" / "zero", base, {"o_proj": 0.5}, size=0.0)
    with pytest.raises(S2FTError, match="all deltas of the adapter 'zero' are zero"):
        resolve(registry, base, "zero")
