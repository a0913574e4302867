"""Which pixels are meant to be opaque: wide things from one opacity on, thin ones from a lower one on."""

from __future__ import annotations

import pytest
import torch

from dreamfusion_fast.training.opaque import OpaqueThresholds

SIZE = 64
THRESHOLDS = OpaqueThresholds(wide=0.4, thin=0.15)


def picture(opacity_of):
    """Opacity `[1, SIZE, SIZE]` of pixel centres, in units of pixels from the middle."""
    axis = torch.arange(SIZE) + 0.5 - SIZE / 2
    return opacity_of(axis[:, None], axis[None, :]).expand(SIZE, SIZE)[None]


def test_a_faint_rod_is_kept_and_as_faint_a_plate_is_not():
    def rod(row, column):
        return 0.3 * torch.exp(-0.5 * (column - 10.0).square()) * (row > -20)

    def plate(row, column):
        return 0.3 * ((row.abs() < 10) & ((column + 14.0).abs() < 10))

    wanted = THRESHOLDS.wanted(picture(lambda row, column: torch.maximum(rod(row, column), plate(row, column))))[0]
    assert wanted[20:, 40:44].any(dim=1).all()  # along the whole rod
    assert not wanted[:, :32].any()


@pytest.mark.parametrize("width", [1.0, 2.0, 4.0])
def test_the_soft_edge_of_something_wide_stays_where_the_wide_threshold_puts_it(width):
    def edge(row, column):
        return torch.sigmoid(-column / width)

    opacity = picture(edge)
    assert torch.equal(THRESHOLDS.wanted(opacity), opacity > 0.4)


def test_a_dense_rod_is_kept_and_a_fainter_one_than_the_threshold_is_not():
    def rods(row, column):
        return 0.9 * ((column - 10).abs() < 1) + 0.1 * ((column + 10).abs() < 1) + 0.0 * row

    wanted = THRESHOLDS.wanted(picture(rods))[0]
    assert wanted[:, 41:43].all()
    assert int(wanted.sum()) == 2 * SIZE


@pytest.mark.parametrize("size", [1, 5, 12, 113])
def test_pictures_of_any_size_and_no_pictures(size):
    assert THRESHOLDS.wanted(torch.rand(3, size, size)).shape == (3, size, size)
    assert THRESHOLDS.wanted(torch.rand(0, size, size)).shape == (0, size, size)
    assert THRESHOLDS.wanted(torch.ones(1, size, size)).all()
    assert not THRESHOLDS.wanted(torch.zeros(1, size, size)).any()


def test_no_gradient_flows():
    opacity = torch.rand(1, 8, 8, requires_grad=True)
    assert not THRESHOLDS.wanted(opacity).requires_grad


@pytest.mark.parametrize(("wide", "thin"), [(0.4, 0.5), (1.0, 0.1), (0.4, 0.0)])
def test_impossible_thresholds_are_refused(wide, thin):
    message = r"thin, wide: got 0\.5, 0\.4, want thin <= wide|got .*, want above 0 and below 1"
    with pytest.raises(ValueError, match=message):
        OpaqueThresholds(wide, thin)
