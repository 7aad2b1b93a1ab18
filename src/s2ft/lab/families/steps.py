"""A few steps of training in place, beside the same steps by full autograd: the deltas have to come out alike.

reference   a plain copy of the model; a step moves, of all its weights, the channels of the slices alone
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from peft import get_peft_model
from torch import Tensor
from torch.optim import SGD
from transformers import PreTrainedModel

from s2ft.lab.families.check import add, chosen, gradients_of, layer_at
from s2ft.lab.families.tiny import inputs_of, output_of
from s2ft.layer.linear import sliced_layers
from s2ft.layer.linears import weight_matrix
from s2ft.training.in_place import in_place

STEPS = 3
MOVE = 0.05  # the norm of the first step, over all slices


def training_error(model: PreTrainedModel, seed: int = 0) -> float:
    """The relative error of the deltas after a few steps of gradient descent.

    Args:
        model: Tiny, in float64 or float32; left as it is.
        seed: Of the channels.

    Raises:
        S2FTError: if it has nothing that s2ft can train.
    """
    inputs, dense = inputs_of(model), deepcopy(model)
    tuned = get_peft_model(deepcopy(model), chosen(model, seed))
    blocks = {path: layer.block("default") for path, layer in sliced_layers(tuned.get_base_model(), "default").items()}
    slices = {path: block.trained for path, block in blocks.items()}
    starts = {path: trained.of(weight_matrix(layer_at(dense, path)).detach()) for path, trained in slices.items()}
    for path, block in blocks.items():
        add(layer_at(dense, path), block.trained, block.weight.detach())
    loss_weights = torch.randn_like(output_of(dense, inputs))
    gradients = gradients_of(dense, inputs, loss_weights, slices)
    rate = MOVE / (_size(gradients) or 1.0)
    optimizer = SGD([block.weight for block in blocks.values()], lr=rate)
    with in_place(tuned):
        for step in range(STEPS):
            gradients = gradients_of(dense, inputs, loss_weights, slices) if step else gradients
            for path, gradient in gradients.items():
                add(layer_at(dense, path), slices[path], -rate * gradient)
            optimizer.zero_grad()
            (output_of(tuned, inputs) * loss_weights).sum().backward()
            optimizer.step()
    expected = {
        path: trained.of(weight_matrix(layer_at(dense, path)).detach()) - starts[path]
        for path, trained in slices.items()
    }
    wrong = {path: block.weight.detach() - expected[path] for path, block in blocks.items()}
    return _size(wrong) / MOVE


def _size(tensors: Mapping[str, Tensor]) -> float:
    """The norm over all of them."""
    return float(torch.stack([tensor.double().norm() for tensor in tensors.values()]).norm())
