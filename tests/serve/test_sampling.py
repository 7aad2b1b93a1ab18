"""Drawing tokens: the right distribution, the right nucleus, the same again from the same seed."""

from collections import Counter

import numpy as np
import pytest
import torch

from s2ft.serve.job import Sampling
from s2ft.serve.sampling import LEAST, choose, tell


def draw(logits: torch.Tensor, how: Sampling, times: int) -> Counter[int]:
    rows = logits.expand(times, -1)
    generator = torch.Generator().manual_seed(int(torch.randint(2**40, ())))
    return Counter(choose(rows, [how] * times, [generator] * times).tolist())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.2)])
def test_tokens_are_drawn_as_often_as_they_should_be(temperature: float, top_p: float) -> None:
    logits, times = torch.randn(13), 20_000
    found = draw(logits, Sampling(1, temperature, top_p), times)
    scaled = np.exp(logits.double().numpy() / temperature)
    wanted = scaled / scaled.sum()
    order = np.argsort(-wanted)
    inside = order[: 1 + int(np.searchsorted(np.cumsum(wanted[order]), top_p))]
    nucleus = np.zeros_like(wanted)
    nucleus[inside] = wanted[inside] / wanted[inside].sum()
    assert set(found) <= {int(token) for token in inside}
    for token, share in enumerate(nucleus):
        error = 5 * (share * (1 - share) / times) ** 0.5
        assert abs(found[token] / times - share) <= error + 1e-12


def test_a_temperature_of_almost_nothing_takes_the_likeliest() -> None:
    logits = torch.randn(3, 50)
    for temperature in (0.0, 1e-30, 1e-6):
        generators = [torch.Generator() for _ in range(3)]
        assert choose(logits, [Sampling(1, temperature)] * 3, generators).tolist() == logits.argmax(-1).tolist()


def test_a_row_draws_the_same_whatever_the_other_rows_do() -> None:
    logits = torch.randn(4, 40)
    how = [Sampling(1, 0.0), Sampling(1, 1.0), Sampling(1, 1.0, 0.5), Sampling(1, 0.7, 0.9)]
    alone = [choose(logits[[row]], [how[row]], [torch.Generator().manual_seed(row)]).item() for row in range(4)]
    together = choose(logits, how, [torch.Generator().manual_seed(row) for row in range(4)])
    assert together.tolist() == alone


def test_what_is_impossible_is_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, -30.0])
    assert set(draw(logits, Sampling(1, 1.0), 5000)) == {1}


def test_logprobs_are_finite_and_ordered() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0, 0.0]])
    (told,) = tell(logits, [1], top=9)
    assert told.logprob == LEAST
    assert [token for token, _ in told.top] == [2, 0, 3, 1]
    assert np.exp([value for _, value in told.top]).sum() == pytest.approx(1)
