"""What autograd keeps for backward: every storage once, and nothing of the model's own."""

import torch
from torch import nn

from s2ft.runtime.memory import own_tensors, saved_bytes


def test_saved_bytes_of_known_graphs():
    x = torch.randn(7, 5, requires_grad=True)
    weight = torch.randn(3, 5, requires_grad=True)
    assert saved_bytes(lambda: (x @ weight.T).sum(), [weight]) == 7 * 5 * 4
    assert saved_bytes(lambda: (x @ weight.T).sum(), [weight, x]) == 0
    assert saved_bytes(lambda: x.exp().exp().sum(), []) == 2 * 7 * 5 * 4
    assert saved_bytes(lambda: (x.detach() @ weight.detach().T).sum(), []) == 0


def test_what_a_part_saved_that_is_gone_does_not_count():
    x = torch.randn(50, requires_grad=True)
    wide = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: (x.sin() * wide.exp().sum().detach()).sum(), [x, wide]) == 4  # the number


def test_a_storage_counts_once_and_a_view_counts_whole():
    x = torch.randn(6, requires_grad=True)
    assert (
        saved_bytes(lambda: (x.exp() * 2).pow(2).sum() + x.sin().sum() + x.cos().sum(), []) == 3 * 6 * 4
    )  # x, exp, exp·2
    wide = torch.randn(100)
    narrow = torch.ones(2, requires_grad=True)
    assert saved_bytes(lambda: (wide[:2] * narrow).sum(), [narrow]) == 100 * 4


def test_what_a_function_of_ones_own_saves_is_counted():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.half())
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return grad * 2 * ctx.saved_tensors[0]

    x = torch.randn(9, requires_grad=True)
    assert saved_bytes(lambda: Square.apply(x).sum(), [x]) == 9 * 2


def test_the_floor_keeps_what_autograd_keeps_for_its_frozen_layers():
    frozen = nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3)).requires_grad_(False)
    x = torch.randn(6, 5, requires_grad=True)
    assert saved_bytes(lambda: frozen(x).sum(), own_tensors(frozen)) == 6 * 4 * 4  # SiLU's input and nothing else
