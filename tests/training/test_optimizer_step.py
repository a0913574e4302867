"""The optimiser's step as a CUDA graph: the steps of a plain fused Adam, wherever gradients lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.training.optimizer_step import CapturedStep

SHAPES = ((113, 2), (7,), (1,))


def optimizer_on(device: str) -> torch.optim.Adam:
    """Two groups of other rates; weights from a seed."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    groups = [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.01}]
    return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15, fused=True)


def parameters_of(optimizer: torch.optim.Adam) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def set_rates(optimizer: torch.optim.Adam, step: int) -> None:
    for group, rate in zip(optimizer.param_groups, (0.125, 0.0078125), strict=True):  # no rounding in float32
        group["lr"] = rate / 2**step


def run(optimizer: torch.optim.Adam, step: CapturedStep | None, places: list[list[Tensor]], steps: range) -> None:
    """Steps whose gradients lie in each of `places` in turn."""
    for k in steps:
        for parameter, place, gradient in zip(
            parameters_of(optimizer), places[k % len(places)], gradients(k), strict=True
        ):
            place.copy_(gradient)
            parameter.grad = place
        set_rates(optimizer, k)
        if step is None:
            optimizer.step()
        else:
            step.prepare()
            step()


def room(device: str) -> list[Tensor]:
    return [torch.empty(shape, device=device) for shape in SHAPES]


def test_on_a_cpu_it_is_the_optimiser_s_own() -> None:
    ours, plain = optimizer_on("cpu"), optimizer_on("cpu")
    run(ours, CapturedStep(ours, torch.device("cpu")), [room("cpu")], range(4))
    run(plain, None, [room("cpu")], range(4))
    for a, b in zip(parameters_of(ours), parameters_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("n_places", [1, 3, 9])
def test_the_steps_of_plain_adam_with_rates_that_change(n_places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in so many places: more than are remembered are never captured, and right all the same."""
    ours, plain = optimizer_on("cuda"), optimizer_on("cuda")
    step = CapturedStep(ours, torch.device("cuda", 0))
    own, calls = ours.step, []
    monkeypatch.setattr(ours, "step", lambda: calls.append(own()))
    places = [room("cuda") for _ in range(n_places)]
    run(ours, step, places, range(20))
    run(plain, None, [room("cuda")], range(20))
    for a, b in zip(parameters_of(ours), parameters_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        for name, value in plain.state[b].items():
            torch.testing.assert_close(ours.state[a][name], value, rtol=0, atol=0)
    # Once as it is and once in the capture for each place; or always as it is.
    assert len(calls) == (20 if n_places > 8 else 2 * n_places)
    assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in plain.param_groups]
    assert not any(group["capturable"] for group in ours.param_groups)


@pytest.mark.gpu
def test_after_a_state_is_loaded_and_for_a_parameter_without_a_gradient() -> None:
    ours, plain = optimizer_on("cuda"), optimizer_on("cuda")
    step = CapturedStep(ours, torch.device("cuda", 0))
    places = [room("cuda")]
    run(ours, step, places, range(4))
    run(plain, None, places, range(4))
    for optimizer in (ours, plain):
        optimizer.load_state_dict(optimizer.state_dict())  # copies: the moments lie elsewhere
    run(ours, step, places, range(4, 8))
    run(plain, None, places, range(4, 8))
    for k in range(8, 12):
        for optimizer in (ours, plain):
            parameters_of(optimizer)[1].grad = None
            set_rates(optimizer, k)
        step()
        plain.step()
    for a, b in zip(parameters_of(ours), parameters_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
