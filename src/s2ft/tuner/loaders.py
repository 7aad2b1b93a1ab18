"""PEFT's and transformers' loaders, guarded: when loading an adapter fails, the model is what it was.

PEFT puts an adapter in, then looks for its weights; transformers writes tensors without asking the tuner. Both are wrapped:
the folder is checked first, the tuner knows what will be loaded while it puts the adapter in (`INCOMING`), and what was done
before a failure is undone. An adapter on the Hub is loaded from the folder in the Hub's cache, so that what was checked is what
is loaded. Loading another method's adapters is unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from s2ft.adapters.compatibility import check_fits
from s2ft.common.errors import S2FTError, raise_together
from s2ft.common.reading import shown
from s2ft.format.config import S2FTConfig, is_foreign
from s2ft.format.config_file import check_method, read_fields
from s2ft.format.digest import check_base
from s2ft.format.terms import METHOD
from s2ft.format.validation import header_problems, value_problems
from s2ft.format.weight_file import Header, WeightFile
from s2ft.layer.adapted import adapted_layers, suspended, turns_of
from s2ft.layer.linear import S2FTLinear
from s2ft.tuner.rollback import rolled_back

INCOMING: ContextVar[Mapping[str, Tensor] | None] = ContextVar("s2ft_incoming", default=None)
"""What a loader is about to load. Without values (device meta) where PEFT shows them to the tuner before it writes them."""

_HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download", "subfolder")


def guard() -> None:
    """Wraps the loaders, once."""
    peft_model: Any = PeftModel
    native: Any = PeftAdapterMixin
    if not hasattr(peft_model.load_adapter, "__wrapped__"):
        own = peft_model.from_pretrained.__func__
        peft_model.from_pretrained = classmethod(_guarded(own, "model_id", _before_from_pretrained))
        peft_model.load_adapter = _guarded(peft_model.load_adapter, "model_id", _before_load_adapter)
        native.load_adapter = _guarded(native.load_adapter, "peft_model_id", _before_native)


def _guarded(own: Callable[..., Any], where: str, before: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """The loader with its checks; the argument `where` names the adapter."""
    signature = inspect.signature(own)

    @wraps(own)
    def loader(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        arguments = {**given.arguments, **given.arguments.get("kwargs", {})}
        if (folder := _cached(arguments.get(where), _hub_options(arguments))) is not None:
            given.arguments[where] = arguments[where] = folder
        model = arguments.get("model", arguments.get("self"))
        with _guard_of(model), before(arguments):
            return own(*given.args, **given.kwargs)

    return loader


def _hub_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Where and how a loader would look for a name on the Hub; transformers bundles some of the arguments."""
    bundled = getattr(arguments.get("load_config"), "download_kwargs", None)
    bundles = (bundled, arguments.get("download_kwargs"), arguments, arguments.get("adapter_kwargs"))
    options = {name: value for bundle in bundles for name, value in (bundle or {}).items()}
    # A revision may be resolved already, to a commit of the base's repository
    options["revision"] = getattr(options.get("revision"), "initial", options.get("revision"))
    return {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}


def _cached(name: Any, options: Mapping[str, Any]) -> str | None:
    """The folder in the Hub's cache that holds an S²FT adapter of this name, fetched if need be; None if it is none."""
    if name is None or Path(str(name)).exists():
        return None
    try:
        config = Path(hf_hub_download(str(name), CONFIG_NAME, **options))
    except Exception:  # as many kinds as the Hub has reasons; the loader gives them in its own words
        return None
    if read_fields(config.parent).get("peft_type") != METHOD:
        return None
    root = config.parents[len(Path(options.get("subfolder", "")).parts)]
    for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        with suppress(EntryNotFoundError):
            hf_hub_download(str(name), file, **{**options, "revision": root.name})
            break
    return str(root)


def _guard_of(model: Any) -> AbstractContextManager[None]:
    """`rolled_back`, if the model then has layers of this method."""
    if not isinstance(model, nn.Module):
        return nullcontext()
    shared = {module.shared for module in model.modules() if isinstance(module, S2FTLinear)}
    return rolled_back(model, *shared, when=lambda: any(isinstance(module, S2FTLinear) for module in model.modules()))


def _before_from_pretrained(arguments: dict[str, Any]) -> Any:
    weights = _adapter_weights(arguments, "model_id", check=arguments.get("config") is not None)
    return nullcontext() if weights is None else _incoming(_without_values(weights))


def _before_load_adapter(arguments: dict[str, Any]) -> Any:
    model = arguments["self"]
    if model.peft_type != METHOD:
        return nullcontext()
    weights = _adapter_weights(arguments, "model_id", check=False, refuse_others=True)
    present = model.peft_config.get(arguments["adapter_name"])
    if present is not None:  # PEFT loads into it without reading the config
        config = S2FTConfig.from_pretrained(str(arguments["model_id"]), **arguments.get("kwargs", {}))
        _check_base(model.get_base_model(), present, config)
    return nullcontext() if weights is None else _incoming(_without_values(weights))


def _check_base(model: nn.Module, present: S2FTConfig, config: S2FTConfig) -> None:
    """Raises `S2FTError` unless what takes the place of the adapter `present` was made for this base.

    A checkpoint of the same adapter was; so a run that goes on need not digest its base anew.
    """
    if not isinstance(config, S2FTConfig) or config.base_digest == present.base_digest:
        return
    with turns_of(model).alone():
        if any(layer.layout is not None for layer in adapted_layers(model)):  # base weights are permuted
            if config.slices != present.slices:  # refused by its channels, when they are read
                return
            check_base(config.base_digest or {}, {**(present.base_digest or {})}, config.base_model_name_or_path)
            return
        with suspended(model):
            check_fits(model, config, {})


def _before_native(arguments: dict[str, Any]) -> Any:
    config, tensors = arguments.get("peft_config"), arguments.get("adapter_state_dict")
    if tensors is not None:
        return _incoming(tensors) if isinstance(config, S2FTConfig) else nullcontext()
    weights = _adapter_weights(arguments, "peft_model_id", check=True)
    return nullcontext() if weights is None else _incoming(weights)


def _without_values(weights: WeightFile) -> dict[str, Tensor]:
    """Names, shapes and dtypes, which PEFT looks up before it loads values."""
    return {
        name: torch.empty(header.shape, dtype=getattr(torch, header.dtype, torch.uint8), device="meta")
        for name, header in weights.headers().items()
    }


@contextmanager
def _incoming(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    token = INCOMING.set(tensors)
    try:
        yield
    finally:
        INCOMING.reset(token)


def _adapter_weights(
    arguments: dict[str, Any], where: str, check: bool, refuse_others: bool = False
) -> WeightFile | None:
    """The weight file of an S²FT adapter in a local folder; None if it is pickled, another method's, or nowhere here.

    Args:
        arguments: Of the loader.
        where: The argument that names the folder.
        check: Whether to check config and weights; else PEFT reads the config next, and they are checked then.
        refuse_others: Whether to refuse another method's.
    """
    given = arguments.get(where)
    folder = Path(str(given), _hub_options(arguments).get("subfolder", ""))
    if given is None or not folder.is_dir():
        return None
    fields = read_fields(folder)
    if is_foreign(fields) and not refuse_others:
        return None
    check_method(folder, fields)
    is_pickled = not (folder / SAFETENSORS_WEIGHTS_NAME).exists()
    if is_pickled and not (folder / WEIGHTS_NAME).exists():
        raise S2FTError(f"{folder} holds no adapter weights: there is no {SAFETENSORS_WEIGHTS_NAME}")
    if is_pickled:
        _check_pickled(folder, S2FTConfig.from_folder(folder, fields))
        return None
    if check:
        S2FTConfig.from_folder(folder, fields)
    return WeightFile(folder)


def _check_pickled(folder: Path, config: S2FTConfig) -> None:
    """Makes the checks of `check_adapter` on a pickled file, which PEFT reads (tensors only) where there is no other."""
    try:
        tensors = load_peft_weights(str(folder), device="cpu")
        headers = {name: Header.of(tensor) for name, tensor in tensors.items()}
    except Exception as error:  # as many kinds as there are ways for a pickle to be broken
        raise S2FTError(f"{folder / WEIGHTS_NAME} cannot be read: {shown(str(error))}") from error
    raise_together(header_problems(config, headers))
    raise_together(value_problems(config, tensors))
