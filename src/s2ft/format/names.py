"""The names of the tensors in an adapter's file. PEFT forms them; all that depends on their form is here.

    base_model.model.{module}.s2ft_block.weight                      a slice's delta
    base_model.model.{module}.s2ft_block.indices                     its channels
    base_model.model.{module}.{parameter}                            a module that is trained whole (modules_to_save)
    base_model.model.{module}.token_adapter.trainable_tokens_delta   rows of an embedding (trainable_token_indices)
    base_model.model.{module}.base_layer.{parameter}                 a copy of the base's own weight, never loaded: PEFT saves
                                                                     it beside a slice of an embedding or output layer

Without the prefix, the names are those of a model that adapters were injected into directly.
"""

from __future__ import annotations

from collections.abc import Collection

PREFIX = "base_model.model."
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT's names of layers whose own weight it may save beside an adapter
_BLOCK = ".s2ft_block."
_TOKENS = ".token_adapter."
_INTERNAL = (".base_layer.", ".original_module.", _BLOCK, _TOKENS)


def bare(name: str) -> str:
    """A tensor's name without PEFT's prefix."""
    return name.removeprefix(PREFIX)


def name_in_layer(module: str) -> str:
    """What a module is called in every layer, with what holds it there, unless that is the layer.

    Example:
        >>> name_in_layer("model.layers.3.mlp.down_proj"), name_in_layer("model.decoder.layers.3.fc1"), name_in_layer("lm_head")
        ('mlp.down_proj', 'fc1', 'lm_head')
    """
    *above, name = module.split(".")
    is_layer = (
        above and above[-1].isdigit() and not any(part.isdigit() for part in above[:-1])
    )  # else an expert of a list
    return name if not above or is_layer else f"{above[-1]}.{name}"


def part_name(module: str, part: str) -> str:
    """The bare name of a slice's `weight` or `indices`.

    Example:
        >>> part_name("model.layers.0.mlp.down_proj", "weight")
        'model.layers.0.mlp.down_proj.s2ft_block.weight'
    """
    return f"{module}{_BLOCK}{part}"


def delta_name(module: str) -> str:
    """The file's name of a slice's delta."""
    return PREFIX + part_name(module, "weight")


def indices_name(module: str) -> str:
    """The file's name of a slice's channels."""
    return PREFIX + part_name(module, "indices")


def is_slice_part(name: str) -> bool:
    """Whether a tensor is a slice's."""
    return _BLOCK in name


def is_token_rows(name: str) -> bool:
    """Whether a tensor holds the trained rows of an embedding."""
    return _TOKENS in name


def is_of_module(name: str, modules: Collection[str]) -> bool:
    """Whether a tensor is a parameter of one of `modules`, which are named by the end of their path, as in PEFT.

    Example:
        >>> is_of_module("base_model.model.lm_head.weight", ["lm_head"]), is_of_module("lm_head2.weight", ["lm_head"])
        (True, False)
    """
    inner = bare(name)
    return not any(part in inner for part in _INTERNAL) and any(f"{module}." in inner for module in modules)


def is_base_copy(name: str, sliced: Collection[str] | None) -> bool:
    """Whether a tensor is the base's own weight, which PEFT puts beside the slice of an embedding or output layer.

    Example:
        >>> is_base_copy("base_model.model.lm_head.base_layer.weight", {"lm_head": "in 3"})
        True
    """
    module, _, parameter = bare(name).rpartition(".base_layer.")
    if parameter not in ("weight", "bias") or not sliced or module not in sliced:
        return False
    return module.rpartition(".")[2] in EMBEDDINGS
