"""The renderer's occupancy grid: when it changes, what it drops, and what of it is in a checkpoint."""

from __future__ import annotations

import pytest
import torch
from threestudio_cases import RADIUS, dense, make, make_batch
from torch import Tensor


def test_the_grid_follows_the_geometry_every_sixteen_steps() -> None:
    renderer = make("flat", grid_prune=True)
    before = renderer.state_dict()["estimator.occs"]
    assert renderer.state_dict()["estimator.binaries"].all()  # until it is known
    renderer.update_step(0, 3)
    renderer.update_step(0, 0, on_load_weights=True)
    renderer.eval().update_step(0, 0)
    assert torch.equal(renderer.state_dict()["estimator.occs"], before)
    renderer.train().update_step(0, 16)
    state = renderer.state_dict()
    assert state["estimator.occs"].max() > before.max()
    assert 0.05 < state["estimator.binaries"].float().mean() < 0.9
    occupied = state["estimator.occs"] > min(float(state["estimator.occs"].mean()), 0.01)
    share = (occupied == state["estimator.binaries"].flatten()).float().mean()
    assert share > 0.999


def test_the_grid_is_told_of_steps_by_the_system() -> None:
    renderer = make("flat", grid_prune=True)
    renderer.do_update_step(0, 0)
    assert not renderer.state_dict()["estimator.binaries"].all()


@pytest.mark.parametrize("chunk", [10**6, 97])
def test_pruned_renders_leave_out_what_the_stock_rule_leaves_out(chunk: int) -> None:
    renderer, batch = make("flat", {"height": 40.0}, grid_prune=True, train_chunk_size=chunk), make_batch()
    renderer.update_step(0, 0)
    state = renderer.state_dict()
    binaries, occs = state["estimator.binaries"][0], state["estimator.occs"]
    least = min(0.01, float(occs.mean()))
    assert least == 0.01

    def keeps(points: Tensor, alpha: Tensor, light: Tensor) -> Tensor:
        cells = ((points / (2 * RADIUS) + 0.5) * 32).floor().long().clamp(0, 31)
        occupied = binaries[cells.unbind(-1)]
        kept = torch.where(occupied, alpha, torch.zeros_like(alpha))
        arrives = torch.cumprod(torch.cat([torch.ones_like(kept[..., :1]), 1.0 - kept[..., :-1]], dim=-1), dim=-1)
        return occupied & (alpha >= least) & (arrives >= 1e-4)

    out, expected = renderer(**batch), dense(renderer, **batch, keeps=keeps)
    for name in ("comp_rgb", "opacity", "depth", "z_variance"):
        torch.testing.assert_close(out[name], expected[name], rtol=1e-9, atol=1e-11)
    everything = dense(renderer, **batch)
    assert not torch.allclose(everything["opacity"], expected["opacity"], rtol=1e-9, atol=1e-11)
    renderer.cfg.prune_alpha_threshold = False

    def occupied(points: Tensor, alpha: Tensor, light: Tensor) -> Tensor:
        return binaries[((points / (2 * RADIUS) + 0.5) * 32).floor().long().clamp(0, 31).unbind(-1)]

    out, expected = renderer(**batch), dense(renderer, **batch, keeps=occupied)
    torch.testing.assert_close(out["opacity"], expected["opacity"], rtol=1e-9, atol=1e-11)


def test_a_thin_scene_is_not_pruned_away() -> None:
    renderer, batch = make("flat", {"height": 0.0}, grid_prune=True), make_batch()
    with torch.no_grad():
        renderer.geometry.second.zero_()
        renderer.geometry.second[:, 0] = -50.0 * torch.sign(renderer.geometry.first.sum(dim=0))
    renderer.update_step(0, 0)
    mean = float(renderer.state_dict()["estimator.occs"].mean())
    assert renderer.estimator.least_alpha() == pytest.approx(min(mean, 0.01))
    assert renderer(**batch)["opacity"].max() > 0.0


def test_state_dicts_are_those_of_the_stock_renderer() -> None:
    renderer = make("flat", grid_prune=True)
    renderer.update_step(0, 0)
    state = renderer.state_dict()
    assert {name: (list(value.shape), value.dtype) for name, value in state.items()} == {
        "bbox": ([2, 3], torch.float32),
        "estimator.resolution": ([3], torch.int32),
        "estimator.aabbs": ([1, 6], torch.float32),
        "estimator.occs": ([32**3], torch.float32),
        "estimator.binaries": ([1, 32, 32, 32], torch.bool),
    }
    assert state["estimator.resolution"].tolist() == [32, 32, 32]
    other, batch = make("flat", grid_prune=True), make_batch()
    assert not torch.equal(other(**batch)["opacity"], renderer(**batch)["opacity"])
    other.load_state_dict(state)
    assert torch.equal(other(**batch)["opacity"], renderer(**batch)["opacity"])
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, state[name])
    unpruned = make("flat")
    unpruned.load_state_dict(state)
    assert unpruned.state_dict()["estimator.binaries"].all()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*estimator.occs"):
        other.load_state_dict({name: value for name, value in state.items() if name != "estimator.occs"})
    with pytest.raises(RuntimeError, match=r"estimator.occs: got shape \[8\], want \[32768\]"):
        other.load_state_dict({**state, "estimator.occs": torch.zeros(8)})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*estimator.more"):
        other.load_state_dict({**state, "estimator.more": torch.zeros(8)})
