"""nerfacc's proposal estimator: where it samples, and how its networks learn."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dreamfusion_fast.integrations import nerfacc
from dreamfusion_fast.integrations.nerfacc.estimators.prop_net import (
    _pdf_loss,
    _transform_stot,
    get_proposal_requires_grad_fn,
)


def bump(t_starts: Tensor, t_ends: Tensor) -> Tensor:
    """A dense slab from 2 to 2.5."""
    middle = 0.5 * (t_starts + t_ends)
    return 50.0 * ((middle > 2.0) & (middle < 2.5))


def sampled(estimator: nerfacc.PropNetEstimator, device: torch.device, **kwargs: object) -> tuple[Tensor, Tensor]:
    given: dict[str, object] = {
        "prop_sigma_fns": [bump],
        "prop_samples": [64],
        "num_samples": 32,
        "n_rays": 5,
        "near_plane": 1.0,
        "far_plane": 5.0,
        **kwargs,
    }
    return estimator.to(device).sampling(**given)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("kind", ["uniform", "lindisp"])
def test_samples_are_where_the_density_is(kind: str, stratified: bool, device: torch.device) -> None:
    t_starts, t_ends = sampled(nerfacc.PropNetEstimator(), device, sampling_type=kind, stratified=stratified)
    assert t_starts.shape == t_ends.shape == (5, 32)
    assert (t_starts[:, 1:] == t_ends[:, :-1]).all()
    assert (t_starts >= 1 - 1e-6).all()
    assert (t_ends <= 5 + 1e-5).all()
    middle = 0.5 * (t_starts + t_ends)
    assert ((middle > 1.9) & (middle < 2.6)).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["uniform", "lindisp"])
def test_without_networks_intervals_are_equal_in_what_they_are_spaced_by(kind: str, device: torch.device) -> None:
    t_starts, t_ends = sampled(
        nerfacc.PropNetEstimator(), device, prop_sigma_fns=[], prop_samples=[], num_samples=8, sampling_type=kind
    )
    edges = torch.cat([t_starts[0], t_ends[0, -1:]]).double().cpu()
    expected = torch.linspace(1, 5, 9, dtype=torch.float64)
    if kind == "lindisp":
        expected = 1 / torch.linspace(1, 1 / 5, 9, dtype=torch.float64)
    torch.testing.assert_close(edges, expected, rtol=1e-5, atol=1e-5)
    ends = _transform_stot(kind, torch.tensor([0.0, 1.0]), 1.0, 5.0)  # type: ignore[arg-type]
    assert ends.tolist() == pytest.approx([1.0, 5.0])


class Proposal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(16))

    def forward(self, t_starts: Tensor, t_ends: Tensor) -> Tensor:
        cell = ((0.5 * (t_starts + t_ends) - 1) / 4 * 16).long().clamp(0, 15)
        return torch.nn.functional.softplus(self.logits)[cell]


def test_networks_learn_to_bound_the_field(device: torch.device) -> None:
    network = Proposal().to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    estimator = nerfacc.PropNetEstimator(optimizer, scheduler)
    losses = []
    for _ in range(80):
        t_starts, t_ends = sampled(
            estimator, device, prop_sigma_fns=[network], sampling_type="uniform", stratified=True, requires_grad=True
        )
        assert not t_starts.requires_grad
        trans, _ = nerfacc.render_transmittance_from_density(t_starts, t_ends, bump(t_starts, t_ends))
        losses.append(estimator.update_every_n_steps(trans, requires_grad=True))
        assert isinstance(losses[-1], float)
        assert estimator.prop_cache == []
    assert losses[-1] < 0.2 * losses[0]
    density = torch.nn.functional.softplus(network.logits.detach())
    assert int(density.argmax()) in (4, 5)  # from 2 to 2.5
    assert scheduler.last_epoch == 80
    assert estimator.update_every_n_steps(trans) == 0.0
    assert scheduler.last_epoch == 81


def test_the_loss_is_summed_over_networks(device: torch.device) -> None:
    networks = [Proposal().to(device), Proposal().to(device)]
    with torch.no_grad():
        networks[1].logits.normal_()
    estimator = nerfacc.PropNetEstimator()
    t_starts, t_ends = sampled(estimator, device, prop_sigma_fns=networks, prop_samples=[20, 30], requires_grad=True)
    kept = list(estimator.prop_cache)
    assert len(kept) == 3
    trans, _ = nerfacc.render_transmittance_from_density(t_starts, t_ends, bump(t_starts, t_ends))
    trans.requires_grad_()
    loss = estimator.compute_loss(trans, loss_scaler=3.0)
    cdfs = torch.cat([1 - trans, torch.ones_like(trans[:, :1])], dim=1).detach()
    expected = sum(_pdf_loss(kept[-1][0], cdfs, *pair).mean() for pair in kept[:2])
    torch.testing.assert_close(loss, 3 * expected)
    loss.backward()
    assert trans.grad is None
    assert all(network.logits.grad.abs().sum() > 0 for network in networks)
    assert estimator.compute_loss(trans).item() == 0.0


def test_nothing_is_kept_without_gradients(device: torch.device) -> None:
    network = Proposal().to(device)
    estimator = nerfacc.PropNetEstimator()
    sampled(estimator, device, prop_sigma_fns=[network])
    assert estimator.prop_cache == []


def test_the_schedule_of_training_steps() -> None:
    due = get_proposal_requires_grad_fn(target=5.0, num_steps=1000)
    steps = [step for step in range(4000) if due(step)]
    assert steps[:3] == [1, 2, 3]
    late = [b - a for a, b in itertools.pairwise(steps) if a > 1000]
    assert set(late) == {6}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prop_samples": [1, 2]}, "prop_samples must"),
        ({"sampling_type": "log"}, "sampling_type must"),
        ({"num_samples": 0}, "n_intervals_per_ray must"),
        ({"prop_sigma_fns": [lambda a, b: a[:, :1]]}, "t_starts has shape"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        sampled(nerfacc.PropNetEstimator(), torch.device("cpu"), **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nerfacc.PropNetEstimator(), "want an optimizer"),
        (lambda: nerfacc.PropNetEstimator(torch.optim.SGD([torch.zeros(1)])), "nothing to train"),
    ],
)
def test_training_needs_an_optimizer_and_samples(make: Callable[[], nerfacc.PropNetEstimator], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        make().update_every_n_steps(torch.ones(1, 2), requires_grad=True)
