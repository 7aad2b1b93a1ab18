"""The methods that `s2ft train` and `s2ft bench training` know: S²FT, and those that it is compared with.

    method          trains                                      from            leaves
    s2ft            slices of chosen channels                   s2ft            an adapter
    lora, dora      low-rank factors (dora: and magnitudes)     PEFT            an adapter
    full            every weight                                transformers    a model
    galore          every weight, moments projected             galore-torch    a model
    lisa            every weight, a few blocks at a time        `lisa.py`       a model

A method says what differs: the PEFT config, the trainer's arguments and callbacks. Weights that are trained themselves
must be fp32, or small steps would be lost; where the machine has bf16, autocast computes in it (as in the S²FT paper).
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from s2ft.common.errors import S2FTError, first_line
from s2ft.finetune.channels import choose_channels
from s2ft.finetune.galore import PlaceProjections, galore_arguments, import_galore, readable_projections
from s2ft.finetune.lisa import Lisa
from s2ft.finetune.options import TrainOptions
from s2ft.layer.linears import features, linear_layer
from s2ft.selection.structure import read_structures

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # the S²FT paper's, with its dropout
LORA_DROPOUT = 0.05


class Method:
    """S²FT, and the ways in which the others differ."""

    title = "S²FT"
    leaves_model = False  # a whole model rather than an adapter
    autocast = False  # compute in bf16 what is kept in fp32

    def check(self) -> None:
        """Raises `S2FTError` if a package is missing."""

    def peft_config(
        self,
        options: TrainOptions,
        digest: str,
        model: PreTrainedModel,
        data: Dataset,
        tokenizer: PreTrainedTokenizerBase,
    ) -> PeftConfig | None:
        """The adapter's config; None if the model's own weights are trained."""
        return choose_channels(options, digest, model, data, tokenizer)

    def arguments(self, options: TrainOptions, model: PreTrainedModel) -> dict[str, Any]:
        """What the trainer is told besides the recipe."""
        return {}

    def callbacks(self, options: TrainOptions, model: PreTrainedModel) -> list[TrainerCallback]:
        """What happens around steps."""
        return []

    def resuming(self) -> AbstractContextManager[Any]:
        """Open while a checkpoint is read."""
        return nullcontext()

    def precision(self, computed: torch.dtype, reason: str) -> tuple[torch.dtype, bool, str]:
        """For a computation in this dtype: that of the base, whether autocast is on, and the reason in words."""
        if computed != torch.bfloat16 or not self.autocast:
            return computed, False, reason
        if not self.leaves_model:
            return computed, True, f"{reason}; fp32 adapter under bf16 autocast"
        return torch.float32, True, f"{reason}; fp32 weights under bf16 autocast"


class Lora(Method):
    """LoRA (arXiv 2106.09685)."""

    title = "LoRA"
    autocast = True
    dora = False

    def peft_config(
        self,
        options: TrainOptions,
        digest: str,
        model: PreTrainedModel,
        data: Dataset,
        tokenizer: PreTrainedTokenizerBase,
    ) -> PeftConfig:
        targets = lora_targets(model) if options.target_modules is None else options.target_modules
        config = lora_config(options.lora_rank, options.lora_alpha, LORA_DROPOUT, targets, dora=self.dora)
        _check_targets(config, model)
        return config


class Dora(Lora):
    """DoRA: LoRA with a trained magnitude for each output (arXiv 2402.09353)."""

    title = "DoRA"
    dora = True


class Full(Method):
    """Every weight."""

    title = "full fine-tuning"
    leaves_model = True
    autocast = True

    def peft_config(self, *_: Any) -> None:
        return None


class Galore(Full):
    """Every weight, by an optimizer whose moments are projected."""

    title = "GaLore"

    def check(self) -> None:
        import_galore()

    def arguments(self, options: TrainOptions, model: PreTrainedModel) -> dict[str, Any]:
        return galore_arguments(model, options.galore_rank)

    def callbacks(self, options: TrainOptions, model: PreTrainedModel) -> list[TrainerCallback]:
        return [PlaceProjections()]

    def resuming(self) -> AbstractContextManager[Any]:
        return readable_projections()


class LisaMethod(Full):
    """Every weight, a few blocks at a time."""

    title = "LISA"

    def callbacks(self, options: TrainOptions, model: PreTrainedModel) -> list[TrainerCallback]:
        lisa = Lisa(options.lisa_layers, options.lisa_interval, options.train_seed)
        lisa.check(model)
        return [lisa]


METHODS: dict[str, Method] = {
    "s2ft": Method(),
    "full": Full(),
    "lora": Lora(),
    "dora": Dora(),
    "galore": Galore(),
    "lisa": LisaMethod(),
}


def adapter_of(checkpoint: Path) -> PeftConfig:
    """The config of a checkpoint's adapter, ready to be trained on."""
    config: PeftConfig = PeftConfig.from_pretrained(str(checkpoint))
    config.inference_mode = False
    return config


def lora_config(
    rank: int, alpha: int, dropout: float = 0.0, targets: str | list[str] = "all-linear", dora: bool = False
) -> LoraConfig:
    """PEFT's config of a LoRA or DoRA for a causal language model."""
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM"
    )


def lora_targets(model: nn.Module) -> str | list[str]:
    """The names of the modules that hold q, k, v, up and down; all linear layers where the model cannot be read.

    Fused projections are adapted whole.
    """
    structures = read_structures(model).structures
    if any(structure.partial for structure in structures):
        return "all-linear"
    paths = [p.module for structure in structures for p in structure.projections if p.name in LORA_TARGETS]
    names = dict.fromkeys(".".join(path.split(".")[-2:]) for path in paths)  # mlp.c_proj is not attn.c_proj
    return list(names) or "all-linear"


def _check_targets(config: LoraConfig, model: nn.Module) -> None:
    """Raises `S2FTError` where PEFT would stop half-way through the model."""
    given = config.target_modules
    if given == "all-linear":
        return
    try:
        matched = [(path, m) for path, m in model.named_modules() if check_target_module_exists(config, path)]
    except re.error as error:
        raise S2FTError(f"target_modules={given!r} is no regular expression: {first_line(error)}") from None
    if not matched:
        names = {path.rpartition(".")[2] for path, module in model.named_modules() if linear_layer(module) is not None}
        raise S2FTError(f"target_modules={_listed(given)} match none of the linear layers {', '.join(sorted(names))}")
    for path, module in matched:
        if linear_layer(module) is None:
            raise S2FTError(
                f"target_modules={_listed(given)} matches {path}, a {type(module).__name__}; name linear layers"
            )


def check_head(config: PeftConfig, model: PreTrainedModel) -> None:
    """Raises `S2FTError` where an adapter would lie on the output layer, whose weight TRL's loss reads past it."""
    head = model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is head), None)
    if path is None:
        return
    sliced = getattr(config, "slices", None)
    if path in sliced if sliced is not None else check_target_module_exists(config, path):
        raise S2FTError(
            f"target_modules={_listed(config.target_modules)} matches {path}, the output layer: training computes the loss "
            "from its weight directly, so an adapter there would never be trained; leave it out"
        )


def _listed(given: str | list[str] | set[str] | None) -> str:
    return repr(sorted(given) if isinstance(given, set) else given)


def equal_rank(model: nn.Module, parameters: int, dora: bool = False) -> int:
    """The rank (at least 1) of the LoRA on all linear layers whose number of parameters is nearest to `parameters`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
        >>> equal_rank(LlamaForCausalLM(config), 4 * (4 * (16 + 16) + 3 * (16 + 24)))
        4
    """
    sizes = [features(linear) for linear in _linears(model)]
    magnitudes = sum(out for _, out in sizes) if dora else 0
    return max(1, round((parameters - magnitudes) / sum(into + out for into, out in sizes)))


def _linears(model: nn.Module) -> list[nn.Module]:
    """PEFT's "all-linear": every linear layer but the head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [module for module in model.modules() if linear_layer(module) is module and module is not head]
