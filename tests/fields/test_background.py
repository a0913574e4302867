"""Backgrounds: learned, random."""

from __future__ import annotations

import pytest
import torch

from dreamfusion_fast.fields import MlpBackground, per_view, random_colors


@pytest.mark.parametrize("count", [0, 1, 113])
def test_mlp_background(device: torch.device, count: int) -> None:
    background = MlpBackground(hidden_layers=2).to(device)
    directions = torch.nn.functional.normalize(torch.randn(count, 3), dim=1).to(device)
    colors = background(directions)
    assert colors.shape == (count, 3)
    assert ((colors > 0) & (colors < 1)).all()
    colors.sum().backward()
    assert all(p.grad is not None for p in background.parameters())


def test_mlp_background_can_fit_a_sky() -> None:
    """Blue above, green below: the encoding carries the direction."""
    background = MlpBackground(generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(torch.randn(500, 3), dim=1)
    above = directions[:, 1:2] > 0
    target = torch.where(above, torch.tensor([0.1, 0.1, 0.9]), torch.tensor([0.1, 0.9, 0.1]))
    optimizer = torch.optim.Adam(background.parameters(), lr=0.03)
    for _ in range(80):
        loss = (background(directions) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01


def test_mlp_background_is_reproducible() -> None:
    a, b = (MlpBackground(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_random_colors_and_per_view() -> None:
    a, b = (random_colors(3, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)
    assert ((a >= 0) & (a <= 1)).all()
    spread = per_view(a, 4)
    assert spread.shape == (12, 3)
    assert torch.equal(spread[4:8], a[1].expand(4, 3))
    with pytest.raises(ValueError, match=r"colors: got shape \[3\]"):
        per_view(a[0], 4)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="frequencies: got 0"):
        MlpBackground(frequencies=0)
