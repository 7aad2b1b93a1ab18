"""A score of your own: which heads and channels are trained is up to a function of the model.

python examples/own_score.py runs/own_score
"""

import sys

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from s2ft import S2FTConfig, select
from s2ft.demo import base_path
from s2ft.selection.units import Structure
from s2ft.selection.weight_scores import unit_weights

MODEL = str(base_path())  # your model: a folder or a name on the Hub


def peak(structures: list[Structure], model: nn.Module, batches: object) -> dict[str, Tensor]:
    """The largest weight of each head and channel, in all its projections; a key-value head counts for all its queries."""
    scores = {}
    for structure in structures:
        peaks = [
            unit_weights(projection, model).abs().amax((1, 2)).repeat_interleave(structure.units // projection.units)
            for projection in structure.projections
        ]
        scores[structure.key] = torch.stack(peaks).amax(0)  # [structure.units]
    return scores


def main(folder: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    selection = select(base, S2FTConfig(ratios=0.1, task_type="CAUSAL_LM"), scores=peak)
    model = get_peft_model(base, selection.config)  # train it as ever; the adapter loads without this file
    model.save_pretrained(folder)
    print(f"trained: {selection.trained}; strategy={selection.config.strategy!r}; the adapter is in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/own_score"])
