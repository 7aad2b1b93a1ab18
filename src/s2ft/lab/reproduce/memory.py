"""How much GPU memory does a training run need? Computed from the model's shape and from what autograd keeps.

    weights            2 bytes each; 4 where they are trained themselves
    what is trained    4 bytes for the gradient, 8 for AdamW's moments, and an adapter's own 4
    activations        linear in blocks, tokens and width: read off models of one and two blocks, a quarter as wide
    logits             2 bytes, and 4 each for their fp32 copy and its gradient; less with a fused loss

Kernels' workspace and fragmentation, about a gigabyte, come on top. GaLore's moments are of the projected gradient; LISA
holds gradients and moments of a few blocks, embeddings and head at a time; its activations are counted as full tuning's.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from s2ft.finetune.lisa import find_blocks
from s2ft.finetune.methods import METHODS
from s2ft.finetune.options import TrainOptions, parse_options
from s2ft.lab.reproduce.recipes import MODELS, Recipe
from s2ft.layer.linears import layer_stack
from s2ft.runtime.memory import own_tensors, saved_bytes
from s2ft.training.in_place import in_place
from s2ft.tuner.model import S2FTModel  # noqa: F401 - PEFT knows the method from here on

SMALL_VOCABULARY = 8  # of the models that are measured: memory of the head is computed
MEASURED_TOKENS = (32, 64)
NARROWER = 4  # by which their width is divided; heads keep their size
WIDTHS = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}
GRADIENT, MOMENTS, FP32, BF16 = 4, 8, 4, 2  # bytes a value


@dataclass(frozen=True)
class Memory:
    """Bytes of each part."""

    weights: float
    trained: float
    copies: float  # of weights, in another dtype, for backward
    a_token: float  # activations and logits

    def total(self, tokens: int) -> float:
        """The sum, with `tokens` going through the model at once."""
        return self.weights + self.trained + self.copies + tokens * self.a_token


def training_memory(recipe: Recipe) -> Memory:
    """What a recipe's training needs on one GPU. Several that work together each need a second copy of the gradients."""
    options = parse_options({**recipe.options, "model": "m", "data": "d", "output": "o"})
    shape = MODELS[recipe.model].shape
    copies, activations = _activations(shape, options)
    with torch.device("meta"):
        model = _adapted(shape, options)[1]
    leaves_model = METHODS[recipe.method].leaves_model
    return Memory(
        weights=parameters(shape) * (FP32 if leaves_model else BF16),
        trained=_galore_bytes(model, options) if recipe.method == "galore" else _trained_bytes(model, options),
        copies=copies,
        a_token=activations + shape["vocab_size"] * (BF16 + FP32 + FP32),
    )


def parameters(shape: dict[str, int]) -> int:
    """Those of a Llama of this shape.

    Example:
        >>> f"{parameters(MODELS['llama2-7b'].shape):,}"
        '6,738,415,616'
    """
    with torch.device("meta"):
        return sum(
            parameter.numel() for parameter in AutoModelForCausalLM.from_config(LlamaConfig(**shape)).parameters()
        )


def _adapted(shape: dict[str, int], options: TrainOptions) -> tuple[PreTrainedModel, nn.Module]:
    """A model of this shape in the dtype that the method trains in, by itself and with the method's adapter."""
    method = METHODS[options.method]
    dtype, _, _ = method.precision(torch.bfloat16, "")
    base = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)
    base.train().requires_grad_(method.leaves_model)
    config = method.peft_config(options, base, None)
    return base, base if config is None else get_peft_model(base, config)


def _trained_bytes(model: nn.Module, options: TrainOptions) -> float:
    """Gradients and moments, and an adapter's own values."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if options.method == "lisa":
        sizes = [sum(parameter.numel() for parameter in block) for block in find_blocks(model).values()]
        trained -= sum(sorted(sizes)[: -options.lisa_layers])
    own = 0 if METHODS[options.method].leaves_model else FP32
    return trained * (own + GRADIENT + MOMENTS)


def _galore_bytes(model: nn.Module, options: TrainOptions) -> float:
    """Whole gradients; moments of the projected ones, and the projections."""
    everything = sum(parameter.numel() for parameter in model.parameters())
    rank, projected, held = options.galore_rank, 0, 0
    for name, parameter in model.named_parameters():
        if layer_stack(name) is not None and parameter.dim() == 2:
            projected += parameter.numel()
            held += rank * (MOMENTS * max(parameter.shape) + FP32 * min(parameter.shape))
    return GRADIENT * everything + MOMENTS * (everything - projected) + held


def _activations(shape: dict[str, int], options: TrainOptions) -> tuple[float, float]:  # copies, bytes a token
    """What grows with the tokens is as wide as the model; what does not, copies of weights, grows with the width's square."""
    few, many = (_at_depth(shape, options, count) for count in MEASURED_TOKENS)
    slope = (many - few) / (MEASURED_TOKENS[1] - MEASURED_TOKENS[0])
    fixed = few - slope * MEASURED_TOKENS[0]
    return NARROWER**2 * fixed, NARROWER * slope


def _at_depth(shape: dict[str, int], options: TrainOptions, tokens: int) -> float:
    """Of the narrow model, as deep as the model itself."""
    narrow = {name: size // NARROWER if name in WIDTHS else size for name, size in shape.items()}
    one_head = (
        1 / narrow["num_attention_heads"]
    )  # the least that can be trained; the input of a head takes little memory
    ratios = {name: max(ratio, one_head) if name == "o_proj" else ratio for name, ratio in _ratios(options).items()}
    thin = options.model_copy(update={"lora_rank": options.lora_rank // NARROWER, "ratios": ratios or None})
    one, two = (_kept({**narrow, "num_hidden_layers": blocks}, thin, tokens) for blocks in (1, 2))
    return one + (two - one) * (shape["num_hidden_layers"] - 1)


def _ratios(options: TrainOptions) -> dict[str, float]:
    return options.ratios if isinstance(options.ratios, dict) else {}


def _kept(shape: dict[str, int], options: TrainOptions, tokens: int) -> int:
    """The bytes that one example of `tokens` tokens keeps for backward, without the head."""
    base, model = _adapted({**shape, "vocab_size": SMALL_VOCABULARY}, options)
    ids = torch.zeros(1, tokens, dtype=torch.long)

    def body() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=METHODS[options.method].autocast):
            hidden: Tensor = base.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.sum()

    with in_place(model) if options.method == "s2ft" else nullcontext():
        return saved_bytes(body, own_tensors(model))
