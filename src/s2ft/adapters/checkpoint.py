"""A base model as it lies on disk: its layers without values, its weights one tensor at a time.

    config.json                      → the model on device `meta`: which layers are linear, and their sizes
    *.safetensors (and their index)  → tensor name → file; a tensor is read when it is asked for

A module's weight is found by the module's path, with or without the model's prefix (`transformer.h.0` and `h.0`). Nothing is
unpickled, and the whole model is never in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from s2ft.adapters.architecture import empty_model
from s2ft.adapters.file import AdapterFile
from s2ft.adapters.stored import Place, channel_numbers, places, plain_numbers
from s2ft.common.errors import S2FTError, first_line, raise_together
from s2ft.common.reading import check_regular, read_json
from s2ft.format.digest import check_base, digest_parts, join_digests, proves, slice_digest
from s2ft.format.folder import CONFIG_FILE
from s2ft.format.slices import Slice
from s2ft.layer.linears import features, is_conv1d, layer_index
from s2ft.layer.stacked import StackedLinear, linear_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME = (
    "model.safetensors",
    "model.safetensors.index.json",
)  # as transformers has them

_PLAIN = ("F64", "F32", "BF16", "F16")  # as safetensors calls them

TIED = "the base ties its embedding to its output layer (tie_word_embeddings), so one cannot change alone"

SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.tokenizer", "*.codes", "*.py")
"""What lies beside the weights: configuration, tokenizer, chat template."""


class Checkpoint:
    """The base model of an adapter, on disk; `open_base` makes and checks it."""

    def __init__(self, folder: Path, adapter: AdapterFile) -> None:
        self.folder = folder
        self._adapter = adapter
        self._recognised: dict[str, list[int]] = {}  # layers that need no model to be found → shapes of their weights
        self._headers: dict[str, tuple[str, list[int]]] = {}  # tensors that were looked at → dtype and shape

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on device meta, by transformers, whose import takes seconds."""
        return empty_model(self._adapter.config, self.folder)

    def recognises(self, adapter: AdapterFile) -> bool:
        """Whether every slice of the adapter is found in the files by name, shape and SHA-256.

        Then these are the layers that it was made for, stored as they are, and no model is needed to say where they lie. Of
        layers outside the blocks, only the model says whether they are tied to another.
        """
        if adapter.kept or any(layer_index(module) is None for module in adapter.slices):
            return False
        if read_json(self.folder / "config.json").get("quantization_config") is not None:
            return False
        shapes = {
            module: self._plain_shape(module, one, adapter.shapes[module]) for module, one in adapter.slices.items()
        }
        self._recognised = {module: shape for module, shape in shapes.items() if shape is not None}
        expected = adapter.config.base_digest or {}
        known = len(self._recognised) == len(shapes) and all(
            proves(expected.get(module, ""), self._digest(module, one, expected.get(module, "")))
            for module, one in adapter.slices.items()
        )
        self._recognised = self._recognised if known else {}
        return known

    def _plain_shape(self, module: str, trained: Slice, delta: tuple[int, ...]) -> list[int] | None:
        """The shape of the module's weight, if it is stored under its own name as plain values, of a size that fits."""
        name = f"{module}.weight"
        if name not in self.files:
            return None
        dtype, shape = self._header(name)
        fits = len(shape) == 2 and shape[1 - trained.dim] == delta[1 - trained.dim]
        return shape if fits and dtype in _PLAIN and int(trained.indices[-1]) < shape[trained.dim] else None

    def linear(self, module: str) -> nn.Module:
        """The linear layer at a path, on device meta."""
        linear = linear_at(self.model, module)
        assert linear is not None  # as `check_fits` has found
        return linear

    def is_stacked(self, module: str) -> bool:
        """Whether it is a parameter of stacked experts."""
        return module not in self._recognised and isinstance(self.linear(module), StackedLinear)

    def sliced_size(self, module: str, side: str) -> int:
        """How many channels the layer has on a side."""
        if (shape := self._recognised.get(module)) is not None:
            return shape[1 if side == "in" else 0]
        return features(self.linear(module))[0 if side == "in" else 1]

    def is_transposed(self, module: str) -> bool:
        """Whether the layer keeps its weight as [in, out], as GPT-2's Conv1D does."""
        return module not in self._recognised and is_conv1d(self.linear(module))

    @property
    def names_experts(self) -> bool:
        """Whether configuration or weights speak of experts; where they do not, no layer is one."""
        stored = self._index() if self.is_sharded else self.files if _has_weights(self.folder) else ()
        names = [*_keys(read_json(self.folder / "config.json")), *stored]  # an index may be here without its shards
        return any(word in name for name in names for word in ("expert", "moe"))

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name → the file that holds it.

        Raises:
            S2FTError: if there are no safetensors files, one is damaged, or the index names a file outside the folder.
        """
        names = sorted(set(self._index().values())) if self.is_sharded else [SAFE_WEIGHTS_NAME]
        found = {tensor: self.folder / name for name in names for tensor in self._tensors(name)}
        if not self.is_sharded:
            return found
        missing = [tensor for tensor in self._index() if tensor not in found]
        if missing:
            raise S2FTError(
                f"{self.folder}: the index names {missing[0]}, which {self._index()[missing[0]]} does not hold"
            )
        return found

    @property
    def index_file(self) -> Path:
        """Where the index of a sharded checkpoint is."""
        return self.folder.joinpath(SAFE_WEIGHTS_INDEX_NAME)

    @property
    def is_sharded(self) -> bool:
        """Whether an index says in which file each tensor is."""
        return not (self.folder / SAFE_WEIGHTS_NAME).is_file() and self.index_file.is_file()

    def _index(self) -> dict[str, str]:
        try:
            names = read_json(self.index_file)["weight_map"]
            foreign = [name for name in names.values() if PurePosixPath(name).name != name or "\\" in name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise S2FTError(f"{self.index_file} is no index of a checkpoint: {error!r}") from error
        if foreign:
            raise S2FTError(f"{self.index_file} names the file {foreign[0]!r}; its files lie beside it")
        return dict(names)

    def _tensors(self, name: str) -> list[str]:
        path = self.folder / name
        check_regular(path)
        if not path.is_file():
            raise S2FTError(f"{self.folder} has no {name}; s2ft reads safetensors only, and never unpickles")
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise S2FTError(f"{path} is truncated or no safetensors file: {first_line(error)}") from error

    def tensor_name(self, module: str, parameter: str = "weight") -> str:
        """The checkpoint's name of a module's parameter.

        Raises:
            S2FTError: if the checkpoint has no such tensor: it is tied to another, or stored in another form.
        """
        name = f"{module}.{parameter}"
        return self._stored(name) or self._refuse(name)

    def _stored(self, name: str) -> str | None:
        """A parameter's name in the files, with or without the model's prefix; None if it is not there."""
        prefix = self.model.base_model_prefix
        return next((n for n in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if n in self.files), None)

    def _refuse(self, name: str) -> NoReturn:
        raise S2FTError(
            f"the checkpoint in {self.folder} has no tensor {name}: it is tied to another one, or stored in "
            "another form. Merge the loaded model instead (`merge_and_unload`)"
        )

    def _header(self, name: str) -> tuple[str, list[int]]:
        """A tensor's dtype, as safetensors calls it, and shape."""
        if name not in self._headers:
            with safe_open(self.files[name], framework="pt") as file:
                found = file.get_slice(name)
                self._headers[name] = found.get_dtype(), list(found.get_shape())
        return self._headers[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor, from the disk."""
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def places(self, module: str, trained: Slice) -> list[Place]:
        """Where the channels of a module's slice lie in the checkpoint.

        Raises:
            S2FTError: if the module's weight is not there, or stored in another form.
        """
        if (shape := self._recognised.get(module)) is not None:
            return places(plain_numbers(f"{module}.weight", shape, trained.side), trained, shape[1 - trained.dim])
        first = None
        for form in self._forms(module, trained):
            if self._misfit(form) is None:
                return form
            first = first or form  # what its shapes should be is said of the model's own form
        return first or self._refuse(module if self.is_stacked(module) else f"{module}.weight")

    def _forms(self, module: str, trained: Slice) -> Iterator[list[Place]]:
        """The places in the model's own form and in the one that it is saved in, as far as their names are here.

        Both may have the same names: Qwen3-VL-MoE's experts are [experts, out, in], and saved as [experts, in, out].
        """
        across = features(self.linear(module))[1 if trained.side == "in" else 0]
        for converted in (False, True):
            numbers = channel_numbers(self.model, module, trained.side, converted)
            names = {name: stored for name in numbers if (stored := self._stored(name)) is not None}
            if len(names) == len(numbers):
                yield places({names[name]: one for name, one in numbers.items()}, trained, across)

    def check_plain(self, adapter: AdapterFile) -> None:
        """Raises `S2FTError` unless the adapter can change its weights: each is here as plain values of its shape, not tied."""
        if getattr(self.model.config, "quantization_config", None) is not None:
            raise S2FTError(f"the base in {self.folder} is quantised; its weights cannot take a delta")
        raise_together(f"{module}: {TIED}" for module in adapter.slices if module in self.tied)
        raise_together(problem for module, one in adapter.slices.items() if (problem := self._problem(module, one)))

    @cached_property
    def tied(self) -> set[str]:
        """Embedding and output layer, where the configuration ties them: the same weight, whatever the files hold."""
        configs = (self.model.config, self.model.config.get_text_config())
        if not any(getattr(config, "tie_word_embeddings", False) for config in configs):
            return set()
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return {name for name, module in self.model.named_modules() if module in ends}

    def _problem(self, module: str, trained: Slice) -> str | None:
        return self._misfit(self.places(module, trained))

    def _misfit(self, form: Sequence[Place]) -> str | None:
        """What the first tensor is that does not hold plain values of its place's shape."""
        for place in form:
            dtype, shape = self._header(place.tensor)
            if dtype not in _PLAIN or shape != place.shape:
                is_now = f"{place.tensor} is {dtype} of shape {shape} in {self.folder}"
                return f"{is_now}; expected plain values of shape {place.shape}"
        return None

    def check_made_for(self, adapter: AdapterFile) -> None:
        """Raises `S2FTError` if the adapter was made for other weights, as far as they can be compared."""
        expected = adapter.config.base_digest or {}
        found = {
            module: self._digest(module, trained, expected.get(module, ""))
            for module, trained in adapter.slices.items()
        }
        check_base(expected, found, adapter.config.base_model_name_or_path)

    def _digest(self, module: str, trained: Slice, expected: str) -> str | None:
        try:
            if self._problem(module, trained):
                return None
        except S2FTError:  # stored in another form
            return None
        parts = digest_parts(expected, trained)
        return join_digests({part: slice_digest(self._values(module, Slice.parse(part))) for part in parts}, trained)

    def _values(self, module: str, trained: Slice) -> Tensor:  # [out_features, s] or [s, in_features]
        """The slice's values, from the disk."""
        parts = [(place, place.read(self.tensor(place.tensor))) for place in self.places(module, trained)]
        rows = torch.empty(len(trained.indices), parts[0][1].shape[1], dtype=parts[0][1].dtype)
        for place, part in parts:
            rows[place.picked] = part
        return rows.T if trained.side == "in" else rows


def open_base(adapter: AdapterFile, name: str | None = None, weights: bool = False) -> Checkpoint:
    """The base of an adapter, checked to fit it.

    Args:
        adapter: Whose base it is.
        name: A folder or a name on the Hub; by default what the adapter's config names, at its revision.
        weights: Whether the weights must be there as plain values, to be merged with.
    """
    folder = _folder(*adapter.base(name), weights)
    base = Checkpoint(folder, adapter)
    if (weights or _has_weights(folder)) and _recognises(base, adapter):
        return base
    from s2ft.adapters.compatibility import check_fits  # here, since it imports transformers and PEFT

    check_fits(base.model, adapter.config, adapter.shapes)
    if weights:
        base.check_plain(adapter)
    if weights or _has_weights(folder):
        base.check_made_for(adapter)
    return base


def _recognises(base: Checkpoint, adapter: AdapterFile) -> bool:
    try:
        return base.recognises(adapter)
    except S2FTError:  # files that are damaged or missing: said by the checks that follow
        return False


def settings_files(folder: Path) -> Iterator[Path]:
    """The files beside the weights that make the folder a usable model."""
    for pattern in SETTINGS:
        yield from sorted(path for path in folder.glob(pattern) if _is_setting(path.name))
    yield from sorted(folder.glob("additional_chat_templates"))


def _is_setting(name: str) -> bool:
    """Whether it is neither an index of weights nor an adapter's config, with which the folder would count as an adapter."""
    return name != CONFIG_FILE and not name.endswith(".index.json")


def _folder(name: str, revision: str | None, weights: bool) -> Path:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise S2FTError(f"base={name!r} is a folder without config.json, so it holds no model")
        return path
    if path.exists() or name.startswith((".", "/", "~")):
        raise S2FTError(f"base={name!r} is not a folder; name the folder of a model, or a model on the Hub")
    from huggingface_hub import snapshot_download

    patterns = [*SETTINGS, "*.safetensors"] if weights else ["*.json"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # a wrong name, a private model, no network
        raise S2FTError(
            f"base={name!r} is no folder here, and the Hub does not give it: {first_line(error)}"
        ) from error


def _keys(config: Any) -> Iterator[str]:
    """The names of all fields, and of fields inside them."""
    for name, value in config.items() if isinstance(config, dict) else ():
        yield name
        yield from _keys(value)


def _has_weights(folder: Path) -> bool:
    return any(folder.joinpath(name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
