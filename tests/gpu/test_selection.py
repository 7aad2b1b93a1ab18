"""Channels that are chosen on a GPU are those that the CPU chooses, but for scores that are almost equal."""

import copy

import numpy as np
import pytest
import torch

from families import build, tokens
from on_gpu import DEVICE
from s2ft import S2FTConfig, select
from s2ft.format.terms import STRATEGIES
from s2ft.selection.scores import score_units
from s2ft.selection.structure import find_structures

CLOSE = 1e-3  # of the largest score


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2"])
def test_every_strategy_chooses_as_on_the_cpu(family: str, strategy: str) -> None:
    model = build(family, torch.float32)
    there = copy.deepcopy(model).to(DEVICE)
    batches = [{"input_ids": tokens(3, 9)} for _ in range(2)]
    structures = find_structures(model)
    expected = score_units(strategy, structures, model, batches, seed=3)
    found = score_units(strategy, find_structures(there), there, batches, seed=3)
    config = S2FTConfig(ratios={"o_proj": 0.5, "down_proj": 0.25}, strategy=strategy, seed=3)
    ours, theirs = (select(one, config, batches).slices for one in (there, model))
    assert ours.keys() == theirs.keys()
    for structure in structures:
        scores, last = expected[structure.key], structure.projections[-1]
        np.testing.assert_allclose(found[structure.key], scores, rtol=CLOSE, atol=CLOSE * np.abs(scores).max())
        chosen, other = (
            {int(channel) // last.width for channel in slices[last.module].indices - last.offset}
            for slices in (ours, theirs)
        )
        assert len(chosen) == len(other)
        if swapped := sorted(chosen ^ other):
            assert np.ptp(scores[swapped]) <= 2 * CLOSE * np.abs(scores).max()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_reads_bf16(strategy: str) -> None:
    model = build("llama", torch.bfloat16).to(DEVICE)
    slices = select(model, S2FTConfig(ratios=0.25, strategy=strategy), [{"input_ids": tokens(3, 9)}]).slices
    assert len(slices) == 6
