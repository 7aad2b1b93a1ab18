"""Every option of `s2ft reproduce`, once: what a recipe leaves open, and what makes its run smaller."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from s2ft.common.errors import gathered
from s2ft.evaluate.options import ENGINES, JudgeModel, JudgeUrl
from s2ft.lab.reproduce.recipes import find_recipe
from s2ft.runtime.options import Count, Options, one_of


class ReproduceOptions(Options):
    """All options of a reproduction. Numbers of examples, steps, questions and tokens make it smaller than the recipe's."""

    recipe: str = Field(description="SUITE/MODEL/METHOD, such as arithmetic/llama2-7b/s2ft")
    data: str = Field(description="Folder laid out like LLM-Adapters; MT-Bench's for instruction; or Hub name")
    output: Path = Field(description="Folder for adapter, answers and result; goes on there")
    training_data: str | None = Field(None, description="A file or Hub name, instead of the recipe's")
    model: str | None = Field(None, description="Folder or Hub name, instead of the recipe's base")
    batch_size: Count = Field(4, description="Examples that a GPU takes at once; a step has 64 in all")
    gradient_checkpointing: bool = Field(False, description="Less memory, more time")
    limit: Count | None = Field(None, description="Train on the first N examples only")
    max_steps: Count | None = Field(None, description="Train N steps at most")
    eval_limit: Count | None = Field(None, description="Use only the first N questions of each task")
    eval_batch_size: Count = Field(8, description="Prompts that go through the model at once")
    max_new_tokens: Count | None = Field(None, description="Of an answer, instead of the suite's")
    engine: Annotated[str, one_of(*ENGINES)] = Field(
        "transformers", description="What writes answers: transformers or vllm"
    )
    judge_url: JudgeUrl = None
    judge_model: JudgeModel = None

    def input_problems(self) -> list[str]:
        """An unknown recipe. `reproduce` looks for the files that the recipe names."""
        return [] if self.recipe is None else gathered(partial(find_recipe, self.recipe))
