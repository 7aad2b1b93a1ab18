"""The next token of each row: the likeliest, or drawn with the row's own random numbers.

One number in [0, 1) is drawn for a token, and looked up in the cumulated probabilities. A rounding difference, as between
batches of different sizes, can change the token only where the number falls within that difference of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from s2ft.serve.job import Sampling, Told

COLDEST = 1e-5  # a lower temperature takes the likeliest token: dividing by it would overflow
LEAST = -9999.0  # told for a probability of zero, since JSON knows no infinity


def are_finite(
    logits: Tensor,  # [rows, vocabulary]
) -> Tensor:  # [rows], bool
    """Which rows say how likely tokens are; some may be impossible, but not all of them."""
    return logits.amax(-1).isfinite()


def choose(
    logits: Tensor,  # [rows, vocabulary], float32
    how: Sequence[Sampling],
    generators: Sequence[Generator],  # one for each row, on the CPU
) -> Tensor:  # [rows], int64
    """The next token of each row."""
    tokens = logits.argmax(-1)
    drawn = [row for row, one in enumerate(how) if one.temperature > COLDEST]
    for within in (False, True):
        rows = [row for row in drawn if (how[row].top_p < 1) == within]
        if rows:
            numbers = torch.cat([torch.rand(1, generator=generators[row], dtype=torch.float64) for row in rows])
            tokens[rows] = _draw(logits[rows], [how[row] for row in rows], numbers.to(logits.device), within)
    return tokens


def _draw(
    logits: Tensor,  # [rows, vocabulary]
    how: Sequence[Sampling],
    numbers: Tensor,  # [rows], in [0, 1)
    within: bool,  # whether `top_p` leaves something out; sorting a large vocabulary takes time
) -> Tensor:  # [rows]
    temperatures = logits.new_tensor([one.temperature for one in how])
    probabilities = (logits / temperatures[:, None]).double().softmax(-1)
    if not within:
        return _look_up(probabilities, numbers)
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    limits = probabilities.new_tensor([one.top_p for one in how])
    kept = probabilities.masked_fill(before >= limits[:, None], 0)  # the likeliest token has nothing before it
    return order.gather(1, _look_up(kept, numbers)[:, None])[:, 0]


def _look_up(
    probabilities: Tensor,  # [rows, vocabulary], not normed
    numbers: Tensor,  # [rows], in [0, 1)
) -> Tensor:  # [rows]
    steps = probabilities.cumsum(-1)
    places = torch.searchsorted(steps, (numbers * steps[:, -1])[:, None], right=True)
    return places[:, 0].clamp(max=steps.shape[-1] - 1)


def tell(
    logits: Tensor,  # [rows, vocabulary], float32
    tokens: Sequence[int],  # one for each row
    top: int,
) -> list[Told]:
    """Each token with its log-probability, and with the `top` likeliest."""
    logprobs = logits.log_softmax(-1).nan_to_num(LEAST, neginf=LEAST)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, places = logprobs.topk(min(top, logprobs.shape[-1]))
    rows = zip(places.tolist(), values.tolist(), strict=True)
    tops = [tuple(zip(ids, numbers, strict=True)) for ids, numbers in rows]
    return [Told(*one) for one in zip(tokens, own, tops, strict=True)]
