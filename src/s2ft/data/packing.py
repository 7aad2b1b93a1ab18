"""Packing puts several examples in one row; checks that they do not attend to each other."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from s2ft.common.errors import S2FTError

_LENGTH = 8


def check_packing(model: PreTrainedModel) -> None:
    """Runs two packed examples twice, with another first one each time: the second one's logits must stay the same.

    Raises:
        S2FTError: if they change, as in a model that builds its attention mask without looking at positions.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(2 * _LENGTH, device=model.device)[None] % vocabulary  # [1, 16]: two examples of 8 tokens
    other = torch.cat([ids[:, :_LENGTH].flip(1), ids[:, _LENGTH:]], dim=1)
    positions = torch.arange(_LENGTH, device=model.device).repeat(2)[None]
    with torch.no_grad():
        first, second = (model(input_ids=row, position_ids=positions, use_cache=False).logits for row in (ids, other))
    if not torch.allclose(first[:, _LENGTH:], second[:, _LENGTH:], rtol=1e-5, atol=1e-5):
        raise S2FTError(
            f"packing=True: in {type(model).__name__}, examples packed into one row see each other; train without packing"
        )
