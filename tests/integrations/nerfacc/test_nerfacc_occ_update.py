"""How nerfacc's occupancy estimator follows a field: schedule, decay, threshold, cells that no camera sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.integrations import nerfacc

BOX = [-1.0, -0.5, -1.0, 1.0, 0.5, 2.0]


def made(device: torch.device, resolution: object = 8, levels: int = 1) -> nerfacc.OccGridEstimator:
    return nerfacc.OccGridEstimator(BOX, resolution, levels).to(device)


def cell_of(estimator: nerfacc.OccGridEstimator, level: int, x: Tensor) -> Tensor:
    """Numbers of the cells of a level that hold positions, among all levels'."""
    low, high = estimator.aabbs[level].double().split(3)
    sizes = estimator.resolution.long()
    i, j, k = ((x.double() - low) / (high - low) * sizes).long().unbind(1)
    return ((level * sizes[0] + i) * sizes[1] + j) * sizes[2] + k


def test_all_cells_at_first(device: torch.device) -> None:
    estimator = made(device, [3, 4, 5], 2)
    asked: list[Tensor] = []

    def occupancy(x: Tensor) -> Tensor:
        asked.append(x)
        return x[:, :1].abs()

    estimator.update_every_n_steps(255 * 16, occupancy, warmup_steps=256 * 16)
    assert [x.shape for x in asked] == [(60, 3)] * 2
    for level, x in enumerate(asked):
        cells = cell_of(estimator, level, x)
        assert cells.tolist() == list(range(60 * level, 60 * (level + 1)))
        torch.testing.assert_close(estimator.occs[cells], x[:, 0].abs())
    before = estimator.occs.clone()
    estimator.update_every_n_steps(16, occupancy)
    assert not torch.equal(asked[0], asked[2])  # other places in the cells
    seen = torch.cat([x[:, 0].abs() for x in asked[2:]])
    torch.testing.assert_close(estimator.occs, torch.maximum(before * 0.95, seen))


def test_places_fill_their_cells(device: torch.device) -> None:
    estimator, asked = made(device, 20), []
    estimator._update(0, lambda x: asked.append(x) or x[:, 0])
    inside = (asked[0] - estimator.aabbs[0, :3]) / (estimator.aabbs[0, 3:] - estimator.aabbs[0, :3]) * 20 % 1
    assert inside.mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.02)
    assert inside.std(0).tolist() == pytest.approx([12**-0.5] * 3, abs=0.01)


@pytest.mark.parametrize("occupied", [0, 100, 4000])
def test_a_quarter_and_the_occupied_later(occupied: int, device: torch.device) -> None:
    estimator, asked = made(device, 16), []  # 4096 cells
    estimator.binaries.view(-1)[torch.randperm(4096)[:occupied].to(device)] = True
    was = estimator.binaries.clone().flatten()
    estimator.update_every_n_steps(256, lambda x: asked.append(x) or torch.zeros_like(x[:, :1]))
    cells = cell_of(estimator, 0, asked[0])
    assert cells.shape[0] == 1024 + min(occupied, 1024)
    assert was[cells[1024:]].all()
    assert cells[:1024].unique().shape[0] == pytest.approx(4096 * (1 - (1 - 1 / 4096) ** 1024), abs=80)
    if 0 < occupied <= 1024:
        assert cells[1024:].unique().shape[0] == occupied


def test_cells_that_are_not_chosen_neither_decay_nor_rise(device: torch.device) -> None:
    estimator, asked = made(device, 16), []
    estimator.occs.fill_(0.5)
    estimator.update_every_n_steps(256, lambda x: asked.append(x) or torch.zeros_like(x[:, 0]), ema_decay=0.5)
    chosen = torch.zeros(4096, dtype=torch.bool, device=device)
    chosen[cell_of(estimator, 0, asked[0])] = True
    assert (estimator.occs[chosen] == 0.25).all()  # once, also where a cell was chosen twice
    assert (estimator.occs[~chosen] == 0.5).all()


def test_updates_are_due_every_n_steps_of_training(device: torch.device) -> None:
    estimator, steps = made(device), []
    for step in range(40):
        estimator.update_every_n_steps(step, lambda x: steps.append(step) or x[:, 0], n=13)  # noqa: B023
    assert steps == [0, 13, 26, 39]
    estimator.eval()
    with pytest.raises(RuntimeError, match="want training mode"):
        estimator.update_every_n_steps(1, lambda x: x[:, 0])
    estimator._update(52, lambda x: steps.append(52) or x[:, 0])
    assert steps[-1] == 52


@pytest.mark.parametrize(("level", "expected"), [(0.004, 0.004), (0.5, 0.01)])
def test_the_threshold_is_the_mean_or_lower(level: float, expected: float, device: torch.device) -> None:
    estimator = made(device)

    def occupancy(x: Tensor) -> Tensor:
        half = torch.arange(x.shape[0], device=x.device) % 2 == 0
        return torch.where(half, 2 * level, 0.0)

    estimator.update_every_n_steps(0, occupancy)
    threshold = min(float(estimator.occs.double().mean()), 0.01)
    assert threshold == pytest.approx(expected)
    assert torch.equal(estimator.binaries.flatten(), estimator.occs > threshold)
    assert 0 < int(estimator.binaries.sum()) < 512
    equal = made(device)
    equal.update_every_n_steps(0, lambda x: torch.full_like(x[:, 0], level))
    assert bool(equal.binaries.any()) == (level > 0.01)  # nothing is above the mean where all cells are alike


def test_marked_cells_stay_and_do_not_count(device: torch.device) -> None:
    estimator, asked = made(device, 16), []
    marked = (torch.rand(4096) < 0.6).to(device)
    estimator.occs[marked] = -1.0

    def occupancy(x: Tensor) -> Tensor:
        asked.append(x)
        return torch.full_like(x[:, :1], 0.004) * (torch.arange(x.shape[0], device=x.device)[:, None] % 2)

    estimator.update_every_n_steps(0, occupancy)
    assert asked[0].shape[0] == int((~marked).sum())
    assert (estimator.occs[marked] == -1).all()
    assert (estimator.occs[~marked] >= 0).all()
    threshold = float(estimator.occs[~marked].double().mean())
    assert torch.equal(estimator.binaries.flatten(), estimator.occs > threshold)
    estimator.binaries.fill_(True)  # also those that are marked
    estimator.update_every_n_steps(256, occupancy)
    assert (estimator.occs[marked] == -1).all()
    assert not estimator.binaries.flatten()[marked].any()
    estimator.occs.fill_(-1.0)
    estimator.update_every_n_steps(0, lambda x: pytest.fail("asked"))
    assert not estimator.binaries.any()


def test_what_is_not_known_is_left_out(device: torch.device) -> None:
    estimator = made(device)
    estimator.occs.fill_(0.5)
    estimator.update_every_n_steps(0, lambda x: torch.full_like(x, torch.nan)[:, :1])
    torch.testing.assert_close(estimator.occs, torch.full_like(estimator.occs, 0.475))


def test_fields_of_16_bits_and_their_gradients(device: torch.device) -> None:
    estimator, weight = made(device), torch.ones((), device=device, requires_grad=True)
    estimator.update_every_n_steps(0, lambda x: (x[:, :1].abs() * weight).half())
    assert estimator.occs.dtype == torch.float32
    assert estimator.occs.max() > 0.5
    assert not estimator.occs.requires_grad


def expected_marks(
    estimator: nerfacc.OccGridEstimator, intrinsics: Tensor, c2w: Tensor, width: int, height: int, near: float
) -> list[float]:
    """Cell by cell and camera by camera, in float64."""
    marks = []
    for box in estimator.aabbs.double().tolist():
        for coords in estimator.grid_coords.tolist():
            sizes = estimator.resolution.tolist()
            place = [box[a] + coords[a] / (sizes[a] - 1) * (box[a + 3] - box[a]) for a in range(3)]
            seen = too_near = False
            for i, pose in enumerate(c2w.double()):
                camera = pose[:3, :3].T @ (torch.tensor(place, dtype=torch.float64) - pose[:3, 3])
                u, v, depth = (intrinsics[min(i, len(intrinsics) - 1)].double() @ camera).tolist()
                if depth > 0 and 0 <= u / depth < width and 0 <= v / depth < height:
                    seen, too_near = seen or depth >= near, too_near or depth < near
            marks.append(0.0 if seen and not too_near else -1.0)
    return marks


@pytest.mark.parametrize("near", [0.0, 2.0])
@pytest.mark.parametrize("each", [False, True])
def test_mark_invisible_cells(near: float, each: bool, device: torch.device) -> None:
    estimator = made(device, [5, 6, 7], 2)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, 3))
    rotation = rotation * torch.linalg.det(rotation)[:, None, None]
    position = -rotation[:, :, 2] * 2.5 + 0.013  # each looks at the middle
    c2w = torch.cat([rotation, position[..., None]], dim=2)
    intrinsics = torch.tensor([[[60.0, 0.0, 31.3], [0.0, 50.0, 22.1], [0.0, 0.0, 1.0]]])
    intrinsics = intrinsics.repeat(3, 1, 1) if each else intrinsics
    estimator.mark_invisible_cells(intrinsics.to(device), c2w.to(device), 64, 48, near, chunk=37)
    expected = expected_marks(estimator, intrinsics, c2w, 64, 48, near)
    assert estimator.occs.tolist() == expected
    assert 20 < expected.count(0.0) < 400
    square = torch.cat([c2w, torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(3, 1, 4)], dim=1)
    other = made(device, [5, 6, 7], 2)
    other.mark_invisible_cells(intrinsics.to(device), square.to(device), 64, 48, near)
    assert torch.equal(other.occs, estimator.occs)


def updated(function: Callable[[Tensor], object]) -> None:
    made(torch.device("cpu")).update_every_n_steps(0, function)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: updated(lambda x: x), "what occ_eval_fn returns must have shape"),
        (lambda: updated(lambda x: x[:3, 0]), "what occ_eval_fn returns must have shape"),
        (lambda: updated(lambda x: None), "what occ_eval_fn returns must be"),
        (lambda: made(torch.device("cpu")).mark_invisible_cells(torch.eye(3), torch.eye(4)[None], 8, 8), "K must have"),
        (lambda: made(torch.device("cpu")).mark_invisible_cells(torch.eye(3)[None], torch.eye(4), 8, 8), "c2w must"),
        (
            lambda: made(torch.device("cpu")).mark_invisible_cells(
                torch.eye(3).repeat(2, 1, 1), torch.eye(4).repeat(3, 1, 1), 8, 8
            ),
            "K must have",
        ),
    ],
)
def test_wrong_arguments_are_told_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        call()
    assert "\n" not in str(error.value)
