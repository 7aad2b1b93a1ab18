"""A vLLM plug-in: `vllm serve BASE --enable-lora` takes native S²FT folders by name.

    request for model "math"  →  $S2FT_VLLM_ADAPTERS/math  →  export --to vllm  →  cache/{hash of its files}  →  LoRARequest

vLLM finds `register` by the entry point `vllm.general_plugins`, in every process that it starts. It asks resolvers for names
that it does not know only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. A changed adapter has another hash, and is converted anew,
as is every one by another version of s2ft, or where the files of the base have changed. The cache is in
$XDG_CACHE_HOME/s2ft/vllm (by default ~/.cache).

Nothing is served that would silently answer as the base: an adapter whose deltas are all zero, or, in the engine, a LoRA for
modules that the engine's model does not have under these names (vLLM itself looks at the last part of a name only).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import wraps
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from s2ft.adapters.file import open_adapter
from s2ft.common.errors import S2FTError
from s2ft.common.reading import is_clean
from s2ft.exports.export import export
from s2ft.format.config_file import method_of

ROOT = "S2FT_VLLM_ADAPTERS"
"""The environment variable that names the folder of the adapters; without it the plug-in does nothing."""

NAME = "S2FT"


def register() -> None:
    """Registers the resolver with vLLM, once in each process.

    Raises:
        S2FTError: if the environment names a folder that is not there.
    """
    _register_backend()
    root = os.environ.get(ROOT)
    if not root:
        return
    if not Path(root).is_dir():
        raise S2FTError(f"{ROOT}={root!r} is not a folder; it holds the adapters, each in a folder of its own")
    from vllm.lora.resolver import LoRAResolverRegistry

    _refuse_lost_modules()
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, _resolver(Path(root)))


def _register_backend() -> None:
    """Makes `s2ft.sync` possible, where this vLLM has weight updates that others can add to."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return
    with suppress(ValueError):  # it was registered before
        WeightTransferEngineFactory.register_engine("s2ft", "s2ft.exports.vllm_weights", "SliceEngine")


def _refuse_lost_modules() -> None:
    """Lets the engine's manager of LoRAs refuse those whose modules it does not have."""
    from vllm.distributed import get_pp_group
    from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager

    def checked(add: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
        @wraps(add)
        def add_adapter(manager: Any, lora: Any) -> bool:
            lost = lost_modules(lora.loras, manager.modules, manager.packed_modules)
            if lost and get_pp_group().world_size == 1:  # else another process may have them
                raise ValueError(
                    f"the model has no {lost[0]}, which the LoRA is for: it would answer as the base there"
                )
            return add(manager, lora)

        return add_adapter

    for manager in (LoRAModelManager, LRUCacheLoRAModelManager):
        if not hasattr(manager.add_adapter, "__wrapped__"):
            manager.add_adapter = checked(manager.add_adapter)


def lost_modules(names: Iterable[str], modules: Iterable[str], packed: Mapping[str, list[str]]) -> list[str]:
    """Those of a LoRA's modules that are neither the engine's nor parts of one; experts, heads and embeddings go their own way.

    Example:
        >>> lost_modules(["m.0.q_proj", "x.0.q_proj"], ["m.0.qkv_proj"], {"m.0.qkv_proj": ["m.0.q_proj", "m.0.k_proj"]})
        ['x.0.q_proj']
    """
    known = {*modules, *(part for parts in packed.values() for part in parts)}
    own_way = ("lm_head", "embed_tokens")
    return sorted(
        name for name in set(names) - known if ".experts" not in name and name.rpartition(".")[2] not in own_way
    )


def adapter_folder(root: Path, name: str) -> Path | None:
    """The folder of the S²FT adapter `name` in `root`; None where there is none, or the name leads out of `root`.

    Example:
        >>> adapter_folder(Path("adapters"), "../secrets") is None
        True
    """
    if not name or PurePath(name).is_absolute() or ".." in PurePath(name).parts or not is_clean(name):
        return None
    try:
        folder = (root / name).resolve()
        if not folder.is_relative_to(root.resolve()):  # by a link
            return None
        return folder if method_of(folder) == NAME else None
    except (S2FTError, OSError, ValueError, RuntimeError):  # no adapter; a name too long, a loop of links
        return None


def converted(folder: Path, base: str) -> Path:
    """The adapter as a LoRA for vLLM, in the cache.

    Raises:
        S2FTError: if it is damaged, for another base, more than vLLM serves, or changes nothing.
    """
    target = _cache() / _key(folder, base)
    if not target.is_dir():
        _refuse_zeros(folder)
        _convert(folder, base, target)
    return target


def _convert(folder: Path, base: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        export(folder, "vllm", aside, base)
        os.rename(aside, target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _refuse_zeros(folder: Path) -> None:
    adapter = open_adapter(folder)
    if not adapter.kept and not any(bool(adapter.delta(module).any()) for module in adapter.slices):
        raise S2FTError(f"all deltas of the adapter {folder.name!r} are zero: it would answer as the base")


def _resolver(root: Path) -> Any:
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class S2FTResolver(LoRAResolver):
        """Finds native adapters below `root`."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """A LoRARequest; None where there is no such adapter. One that cannot be served raises: vLLM answers 400."""
            folder = adapter_folder(root, lora_name)
            if folder is None:
                return None
            lora = await asyncio.to_thread(converted, folder, base_model_name)
            return LoRARequest(lora_name=lora_name, lora_int_id=int(lora.name[:7], 16) + 1, lora_path=str(lora))

    return S2FTResolver()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2ft" / "vllm"


def _key(folder: Path, base: str) -> str:
    """A hash of the adapter's files, of the base, and of this version, since another may convert otherwise.

    By a folder's name there may be another model now, so size and time of its files count; reading them takes too long.
    """
    stats = [(path.name, path.stat()) for path in sorted(Path(base).glob("*.safetensors")) if path.is_file()]
    files = [f"{name} {one.st_mtime_ns} {one.st_size}" for name, one in stats]
    digest = hashlib.sha256("\n".join([version("s2ft"), base, *files]).encode())
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        try:
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise S2FTError(f"{folder} holds no whole adapter: {error}") from error
    return digest.hexdigest()
