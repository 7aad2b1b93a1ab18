"""A way to fine-tune: what `s2ft train` asks of each method."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel, TrainerCallback

    from s2ft.finetune.channels import Examples
    from s2ft.finetune.options import TrainOptions

ADAMW = frozenset({"optim", "weight_decay"})  # options of methods that leave the optimizer open


class Method:
    """A way to fine-tune; what stands here is what most methods do."""

    title: str  # in logs and cards
    learning_rate: float  # the S²FT paper's, for commonsense
    options: frozenset[str]  # those that not every method takes
    ours = False  # trains slices: their rule gives the learning rate, and PEFT knows the adapter once s2ft is imported
    leaves_model = False  # a whole model rather than an adapter
    foreseeable = True  # one batch, tried before the run, tells what each step takes
    autocast = False  # keeps what it trains in fp32 and computes in bf16 (as in the S²FT paper)

    def check(self) -> None:
        """Raises `S2FTError` if a package is missing."""

    def peft_config(
        self, options: TrainOptions, model: PreTrainedModel, examples: Examples | None
    ) -> PeftConfig | None:
        """The adapter's config; None if the model's own weights are trained.

        Args:
            examples: The training data, for methods that look at it first.
        """
        return None

    def of_size(self, model: PreTrainedModel, parameters: int, given: TrainOptions | None = None) -> dict[str, Any]:
        """Options with which about so many parameters are trained; none where the method leaves no choice.

        Args:
            model: Without values will do (device meta).
            parameters: That are to be trained.
            given: Options that stay what they are, such as the layers to train.
        """
        return {}

    def problems(self, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with the options that could be read, beside what their types say."""
        return []

    def arguments(self, options: TrainOptions, model: PreTrainedModel) -> dict[str, Any]:
        """`TrainingArguments` of the method: its optimizer."""
        return {}

    def callbacks(self, options: TrainOptions, model: PreTrainedModel) -> list[TrainerCallback]:
        """What happens around steps."""
        return []

    def building(self) -> AbstractContextManager[Any]:
        """Open while the adapter is laid on the model."""
        return nullcontext()

    def resuming(self) -> AbstractContextManager[Any]:
        """Open while a checkpoint is read."""
        return nullcontext()

    def precision(self, computed: torch.dtype, reason: str) -> tuple[torch.dtype, bool, str]:
        """For a computation in this dtype: the dtype of the base, whether autocast is on, and the reason in words."""
        import torch

        if computed != torch.bfloat16 or not self.autocast:
            return computed, False, reason
        if not self.leaves_model:
            return computed, True, f"{reason}; fp32 adapter under bf16 autocast"
        return torch.float32, True, f"{reason}; fp32 weights under bf16 autocast"
