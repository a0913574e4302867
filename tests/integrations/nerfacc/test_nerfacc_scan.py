"""Running sums and products by nerfacc's names, and packed info, against float64 loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.integrations import nerfacc

SCANS: dict[str, Callable[..., Tensor]] = {
    "inclusive_sum": nerfacc.inclusive_sum,
    "exclusive_sum": nerfacc.exclusive_sum,
    "inclusive_prod": nerfacc.inclusive_prod,
    "exclusive_prod": nerfacc.exclusive_prod,
}
COUNTS = [[], [0], [1], [0, 0, 5, 0, 1, 31, 32, 33, 0], [1023, 0, 113]]


def expected_scan(name: str, inputs: Tensor, counts: list[int]) -> Tensor:
    outputs, i = [], 0
    for count in counts:
        total = 0.0 if name.endswith("sum") else 1.0
        for _ in range(count):
            after = total + float(inputs[i]) if name.endswith("sum") else total * float(inputs[i])
            outputs.append(after if name.startswith("inclusive") else total)
            total, i = after, i + 1
    return torch.tensor(outputs, dtype=torch.float64)


def rays_of(counts: list[int], device: torch.device) -> dict[str, Tensor]:
    number = torch.tensor(counts, dtype=torch.int64)
    indices = torch.repeat_interleave(torch.arange(len(counts)), number)
    packed_info = torch.stack([number.cumsum(0) - number, number], dim=1)
    return {"indices": indices.to(device), "packed_info": packed_info.to(device)}


@pytest.mark.parametrize("by", ["indices", "packed_info"])
@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: f"{len(counts)} rays {sum(counts)}")
@pytest.mark.parametrize("name", SCANS)
def test_packed_scans(name: str, counts: list[int], by: str, device: torch.device) -> None:
    inputs = torch.rand(sum(counts)) + (0.5 if name.endswith("prod") else -0.5)
    expected = expected_scan(name, inputs, counts)
    actual = SCANS[name](inputs.to(device), **{by: rays_of(counts, device)[by]})
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=2e-5, atol=2e-5)
    exact = SCANS[name](inputs.to(device).double(), **{by: rays_of(counts, device)[by]})
    torch.testing.assert_close(exact.cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (4, 113)])
def test_batched_scans_are_those_of_packed_rows(name: str, shape: tuple[int, int], device: torch.device) -> None:
    inputs = torch.rand(shape, dtype=torch.float64, device=device) + 0.5
    packed_info = rays_of([shape[1]] * shape[0], device)["packed_info"]
    packed = SCANS[name](inputs.flatten(), packed_info)
    torch.testing.assert_close(SCANS[name](inputs), packed.view(shape), rtol=1e-12, atol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SCANS)
def test_gradients_of_scans(name: str, packed: bool, device: torch.device) -> None:
    inputs = torch.randn(2, 4, dtype=torch.float64, device=device)
    inputs[0, 2] = 0.0  # a product's gradient is no division by it
    if packed:
        rays = {"packed_info": rays_of([3, 0, 1, 4], device)["packed_info"]}
        inputs = inputs.flatten()
    else:
        rays = {}
    inputs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SCANS[name](x, **rays), inputs)
    assert torch.autograd.gradgradcheck(lambda x: SCANS[name](x, **rays), inputs)


@pytest.mark.parametrize("name", SCANS)
def test_nothing_of_another_ray_gets_into_a_scan(name: str, device: torch.device) -> None:
    inputs = torch.tensor([1.0, math.inf, math.nan, 2.0, 3.0, 1e30, 4.0], device=device)
    rays = rays_of([3, 2, 1, 1], device)
    actual = SCANS[name](inputs, indices=rays["indices"])
    assert actual[3:].tolist() == expected_scan(name, inputs, [3, 2, 1, 1])[3:].tolist()


def test_pack_info(device: torch.device) -> None:
    ray_indices = torch.tensor([0, 2, 2, 2, 2], device=device)
    packed_info = nerfacc.pack_info(ray_indices, 4)
    assert packed_info.dtype == torch.int64
    assert packed_info.tolist() == [[0, 1], [1, 0], [1, 4], [5, 0]]
    assert nerfacc.pack_info(ray_indices).tolist() == [[0, 1], [1, 0], [1, 4]]
    assert nerfacc.pack_info(ray_indices[:0]).shape == (0, 2)
    assert nerfacc.pack_info(ray_indices[:0], 2).tolist() == [[0, 0]] * 2
    assert nerfacc.pack_info(ray_indices.int(), 3).tolist() == [[0, 1], [1, 0], [1, 4]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nerfacc.inclusive_sum([1.0]), "inputs must be a float tensor"),
        (lambda: nerfacc.inclusive_sum(torch.ones(3, dtype=torch.int64)), "inputs must be a float tensor"),
        (lambda: nerfacc.inclusive_sum(torch.tensor(1.0)), "got a number"),
        (lambda: nerfacc.inclusive_sum(torch.ones(3, 1), torch.tensor([[0, 3]])), "packed inputs must"),
        (lambda: nerfacc.inclusive_sum(torch.ones(3), torch.tensor([0, 3])), "packed_info must have shape"),
        (lambda: nerfacc.inclusive_sum(torch.ones(3), indices=torch.zeros(2).long()), "indices must have shape"),
        (lambda: nerfacc.inclusive_sum(torch.ones(3), torch.tensor([[0, 3]]), torch.zeros(3).long()), "got both"),
        (lambda: nerfacc.inclusive_sum(torch.ones(3), torch.tensor([[0, 2]])), "packed_info must"),
        (lambda: nerfacc.pack_info(torch.ones(3)), "ray_indices must be"),
        (lambda: nerfacc.pack_info(torch.zeros(3).long(), -1), "n_rays must be"),
        (lambda: nerfacc.pack_info(torch.zeros(3).long(), 1.5), "n_rays must be"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        call()
    assert "\n" not in str(error.value)
