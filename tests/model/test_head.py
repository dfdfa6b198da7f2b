from __future__ import annotations

import pytest
import torch

from equifeat.errors import RecipeError
from equifeat.model.head import Head


def test_untrained_residual_and_none_give_exactly_the_input() -> None:
    x = torch.randn(2, 8, 5, 3)
    assert torch.equal(Head("residual", 8)(x), x)
    assert torch.equal(Head("none", 8)(x), x)


def test_conv_is_one_convolution_with_torchs_start() -> None:
    head = Head("conv", 64, seed=3)
    assert head.conv is not None
    assert sum(parameter.numel() for parameter in head.parameters()) == 64 * 64 * 9 + 64
    bound = (64 * 9) ** -0.5  # nn.Conv2d draws weight and bias uniformly within 1/√fan-in
    for parameter in head.conv.parameters():
        values = parameter.detach()
        assert 0.9 * bound < float(values.abs().max()) <= bound
        assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.2)
    x = torch.randn(1, 64, 4, 4)
    assert torch.equal(head(x), head.conv(x))


def test_start_depends_on_the_seed_only_and_leaves_the_callers_numbers() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first = Head("conv", 8, seed=5)
    assert torch.equal(torch.rand(2), expected)
    second, third = Head("conv", 8, seed=5), Head("conv", 8, seed=6)
    assert first.conv is not None
    assert second.conv is not None
    assert third.conv is not None
    assert torch.equal(first.conv.weight, second.conv.weight)
    assert not torch.equal(first.conv.weight, third.conv.weight)


def test_residual_trains_from_zero() -> None:
    head = Head("residual", 4)
    head(torch.randn(1, 4, 3, 3)).square().sum().backward()
    assert head.conv is not None
    assert head.conv.weight.grad is not None
    assert float(head.conv.weight.grad.abs().max()) > 0


def test_unknown_kind_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"not 'residul'\. Did you mean residual"):
        Head("residul", 4)
