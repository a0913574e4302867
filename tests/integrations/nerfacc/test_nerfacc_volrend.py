"""Volume rendering by nerfacc's names, against float64 loops over each ray's samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.integrations import nerfacc

COUNTS = [[], [0], [1], [0, 0, 5, 0, 1, 31, 32, 33, 0], [1023, 0, 113], [2] * 113]


def rays_of(counts: list[int], device: torch.device) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64)).to(device)


def samples_of(
    counts: list[int], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Starts, ends and densities; some intervals are empty, some samples opaque."""
    m = sum(counts)
    t_starts = torch.rand(m, dtype=torch.float64)
    lengths = 0.1 * torch.rand(m, dtype=torch.float64) * (torch.rand(m) > 0.1)
    sigmas = torch.rand(m, dtype=torch.float64) ** 4 * 50
    return (*(x.to(device, dtype) for x in (t_starts, t_starts + lengths, sigmas)),)


def expected_weights(alphas: Tensor, counts: list[int], prefix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights and transmittance: light times what is absorbed of it, sample by sample."""
    weights, trans, i = [], [], 0
    for count in counts:
        light = 1.0
        for _ in range(count):
            before = light * (1.0 if prefix is None else float(prefix[i]))
            weights.append(before * float(alphas[i]))
            trans.append(before)
            light *= 1 - float(alphas[i])
            i += 1
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(trans, dtype=torch.float64)


def near(actual: Tensor, expected: Tensor, roundings: float = 32) -> None:
    """Within so many roundings of the dtype of `actual`, relative to 1 or the largest number."""
    assert actual.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    tolerance = roundings * torch.finfo(actual.dtype).eps * scale
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("packing", ["ray_indices", "packed_info", "int32 packed_info"])
@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: f"{len(counts)} rays {sum(counts)}")
def test_packed_weights(counts: list[int], packing: str, device: torch.device) -> None:
    t_starts, t_ends, sigmas = samples_of(counts, device)
    ray_indices = rays_of(counts, device)
    rays = {"ray_indices": ray_indices, "n_rays": len(counts)}
    if packing != "ray_indices":
        packed = nerfacc.pack_info(ray_indices.clone(), len(counts))
        rays = {"packed_info": packed.int() if "int32" in packing else packed}
    alphas = 1 - torch.exp(-sigmas.double() * (t_ends.double() - t_starts.double()))
    prefix = torch.rand_like(sigmas)
    expected, expected_trans = expected_weights(alphas, counts)
    prefixed, prefixed_trans = expected_weights(alphas, counts, prefix)

    weights, trans, seen = nerfacc.render_weight_from_density(t_starts, t_ends, sigmas, **rays)
    near(weights, expected)
    near(trans, expected_trans)
    near(seen, alphas)
    weights, trans, _ = nerfacc.render_weight_from_density(t_starts, t_ends, sigmas, **rays, prefix_trans=prefix)
    near(weights, prefixed)
    near(trans, prefixed_trans)
    weights, trans = nerfacc.render_weight_from_alpha(alphas.float(), **rays)
    near(weights, expected)
    near(trans, expected_trans)
    weights, trans = nerfacc.render_weight_from_alpha(alphas.float(), **rays, prefix_trans=prefix)
    near(weights, prefixed)
    trans, seen = nerfacc.render_transmittance_from_density(t_starts, t_ends, sigmas, **rays)
    near(trans, expected_trans)
    near(seen, alphas)
    near(nerfacc.render_transmittance_from_alpha(alphas.float(), **rays), expected_trans)
    near(nerfacc.render_transmittance_from_alpha(alphas.float(), **rays, prefix_trans=prefix), prefixed_trans)


@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (1, 1), (5, 113), (2, 3, 4)])
def test_batched_weights_are_those_of_packed_samples(shape: tuple[int, ...], device: torch.device) -> None:
    n = shape[-1]
    counts = [n] * (math.prod(shape) // n if n else 0)
    packed = samples_of(counts, device)
    t_starts, t_ends, sigmas = (x.view(shape) for x in packed)
    rays = {"ray_indices": rays_of(counts, device), "n_rays": len(counts)}
    expected = nerfacc.render_weight_from_density(*packed, **rays)
    for actual, wanted in zip(nerfacc.render_weight_from_density(t_starts, t_ends, sigmas), expected, strict=True):
        assert torch.equal(actual, wanted.view(shape))
    alphas = expected[2]
    by_alpha = nerfacc.render_weight_from_alpha(alphas.view(shape))
    for actual, wanted in zip(by_alpha, nerfacc.render_weight_from_alpha(alphas, **rays), strict=True):
        assert torch.equal(actual, wanted.view(shape))
    seen = nerfacc.render_visibility_from_density(t_starts, t_ends, sigmas, early_stop_eps=0.1, alpha_thre=0.05)
    assert seen.shape == shape


def test_non_contiguous_samples_of_a_transposed_batch(device: torch.device) -> None:
    t_starts, t_ends, sigmas = (x.view(7, 5).t() for x in samples_of([7] * 5, device))
    expected = nerfacc.render_weight_from_density(*(x.contiguous() for x in (t_starts, t_ends, sigmas)))
    for actual, wanted in zip(nerfacc.render_weight_from_density(t_starts, t_ends, sigmas), expected, strict=True):
        assert torch.equal(actual, wanted)


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "weight density": nerfacc.render_weight_from_density,
    "trans density": nerfacc.render_transmittance_from_density,
    "weight alpha": lambda a, b, alphas, **rays: nerfacc.render_weight_from_alpha(alphas, **rays),
    "trans alpha": lambda a, b, alphas, **rays: (nerfacc.render_transmittance_from_alpha(alphas, **rays),),
}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_weights(name: str, batched: bool, device: torch.device) -> None:
    counts = [3, 3] if batched else [0, 4, 1, 2, 0]
    t_starts, t_ends, sigmas = samples_of(counts, device, torch.float64)
    t_ends = t_starts + 0.03 + 0.1 * torch.rand_like(t_starts)
    given = sigmas if "density" in name else 0.05 + 0.9 * torch.rand_like(sigmas)
    rays = {} if batched else {"ray_indices": rays_of(counts, device), "n_rays": len(counts)}
    tensors = [x.view(2, 3) if batched else x for x in (t_starts, t_ends, given + 0.1 * ("density" in name))]
    tensors = [x.clone().requires_grad_("density" in name or i == 2) for i, x in enumerate(tensors)]
    assert torch.autograd.gradcheck(lambda *x: FUNCTIONS[name](*x, **rays), tensors)


def test_weights_from_alpha_are_finite_at_zero_and_one(device: torch.device) -> None:
    alphas = torch.tensor([0.0, 0.5, 1.0, 0.5, 1.0, 1.0, 0.0], device=device, requires_grad=True)
    one_ray = torch.zeros(7, dtype=torch.int64, device=device)
    weights, trans = nerfacc.render_weight_from_alpha(alphas, ray_indices=one_ray, n_rays=1)
    near(weights, torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]))
    near(trans, torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]))
    (weights * torch.arange(1.0, 8.0, device=device)).sum().backward()
    # d/d alpha_i = T_i s_i - sum_{j>i} s_j alpha_j prod_{k<j, k != i} (1 - alpha_k)
    expected = [1 - (2 * 0.5 + 3 * 0.5), 2 - 3.0, 0.5 * 3 - 0.5 * (4 * 0.5 + 5 * 0.5), 0.0, 0.0, 0.0, 0.0]
    assert alphas.grad is not None
    near(alphas.grad, torch.tensor(expected))


def test_intervals_of_no_length_have_neither_weight_nor_gradient(device: torch.device) -> None:
    """threestudio's importance estimator sorts two samplings into one: equal edges come along."""
    t_starts = torch.tensor([[1.0, 1.0, 1.5, 2.0]], device=device)
    t_ends = torch.tensor([[1.0, 1.5, 2.0, 2.0]], device=device)
    sigmas = torch.tensor([[3.0, 1.0, 2.0, math.inf]], device=device, requires_grad=True)
    weights, trans, _ = nerfacc.render_weight_from_density(t_starts, t_ends, sigmas)
    half, whole = math.exp(-0.5), math.exp(-1.5)
    near(weights, torch.tensor([[0.0, 1 - half, half * (1 - math.exp(-1.0)), 0.0]]))
    near(trans, torch.tensor([[1.0, 1.0, half, whole]]))
    weights.sum().backward()
    assert sigmas.grad is not None
    near(sigmas.grad, torch.tensor([[0.0, 0.5 * whole, 0.5 * whole, 0.0]]))
    assert not nerfacc.render_visibility_from_density(t_starts, t_ends, sigmas, alpha_thre=1e-3)[0, 0]


def test_the_fake_sample_of_an_empty_batch(device: torch.device) -> None:
    """nerfstudio makes one sample from 1 to 1 where there is none."""
    index = torch.zeros(1, dtype=torch.int64, device=device)
    ones, density = torch.ones(1, device=device), torch.ones(1, device=device, requires_grad=True)
    weights, _, _ = nerfacc.render_weight_from_density(
        ones, ones, density, packed_info=nerfacc.pack_info(index, 113), n_rays=113
    )
    nerfacc.accumulate_along_rays(weights, None, index, 113).sum().backward()
    assert weights.tolist() == [0.0]
    assert density.grad is not None
    assert density.grad.tolist() == [0.0]


def test_visibility_takes_both_thresholds(device: torch.device) -> None:
    alphas = torch.tensor([0.4, 0.3, 0.8, 0.8, 0.5], device=device)
    rays = {"ray_indices": torch.tensor([0, 2, 2, 2, 2], device=device), "n_rays": 3}
    # Transmittance 1, 1, 0.7, 0.14, 0.028
    assert nerfacc.render_visibility_from_alpha(alphas, **rays, early_stop_eps=0.03).tolist() == [True] * 4 + [False]
    both = nerfacc.render_visibility_from_alpha(alphas, **rays, early_stop_eps=0.05, alpha_thre=0.35)
    assert both.tolist() == [True, False, True, True, False]
    prefix = torch.full_like(alphas, 0.1)
    left = nerfacc.render_visibility_from_alpha(alphas, **rays, early_stop_eps=0.05, prefix_trans=prefix)
    assert left.tolist() == [True, True, True, False, False]
    sigmas = -torch.log1p(-alphas)
    density = nerfacc.render_visibility_from_density(
        torch.zeros_like(sigmas),
        torch.ones_like(sigmas),
        sigmas,
        **rays,
        early_stop_eps=0.05,
        alpha_thre=torch.tensor(0.35, device=device),
    )
    assert density.tolist() == both.tolist()
    without_number = nerfacc.render_visibility_from_alpha(alphas, ray_indices=rays["ray_indices"], early_stop_eps=0.03)
    assert without_number.tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("known", [False, True], ids=["new indices", "known indices"])
@pytest.mark.parametrize("channels", [None, 1, 2, 3, 17])
@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: f"{len(counts)} rays {sum(counts)}")
def test_accumulation(counts: list[int], channels: int | None, known: bool, device: torch.device) -> None:
    ray_indices = rays_of(counts, device)
    if known:
        nerfacc.pack_info(ray_indices, len(counts))
    weights = torch.rand(sum(counts), device=device)
    values = None if channels is None else torch.randn(sum(counts), channels, device=device)
    expected = torch.zeros(len(counts), channels or 1, dtype=torch.float64)
    for i, ray in enumerate(ray_indices.tolist()):
        expected[ray] += weights[i].double().cpu() * (1 if values is None else values[i].double().cpu())
    near(nerfacc.accumulate_along_rays(weights, values, ray_indices, len(counts)), expected, 64)
    outputs = torch.ones_like(expected, dtype=torch.float32, device=device)
    assert nerfacc.accumulate_along_rays_(weights, values, ray_indices, outputs) is None
    near(outputs, expected + 1, 64)


def test_known_indices_that_were_changed_are_new_ones(device: torch.device) -> None:
    ray_indices = torch.tensor([0, 0, 2], device=device)
    nerfacc.pack_info(ray_indices, 3)
    ray_indices[1] = 2
    sums = nerfacc.accumulate_along_rays(torch.ones(3, device=device), None, ray_indices, 3)
    assert sums[:, 0].tolist() == [1.0, 0.0, 2.0]
    assert nerfacc.pack_info(ray_indices, 3).tolist() == [[0, 1], [1, 0], [1, 2]]
    assert nerfacc.pack_info(ray_indices, 4).tolist() == [[0, 1], [1, 0], [1, 2], [3, 0]]


def test_sums_of_nothing(device: torch.device) -> None:
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    nerfacc.pack_info(nothing, 3)
    weights = torch.zeros(0, device=device, requires_grad=True)
    sums = nerfacc.accumulate_along_rays(weights, torch.zeros(0, 2, device=device), nothing, 3)
    assert sums.tolist() == [[0.0, 0.0]] * 3
    sums.sum().backward()
    assert weights.grad is not None
    assert weights.grad.shape == (0,)


def test_new_indices_may_be_in_any_order(device: torch.device) -> None:
    ray_indices = torch.tensor([2, 0, 1, 0], device=device)
    sums = nerfacc.accumulate_along_rays(torch.tensor([1.0, 2.0, 3.0, 4.0], device=device), None, ray_indices, 3)
    assert sums[:, 0].tolist() == [6.0, 3.0, 1.0]


@pytest.mark.parametrize("known", [False, True])
def test_gradients_of_accumulation(known: bool, device: torch.device) -> None:
    ray_indices = rays_of([0, 3, 1, 0, 2], device)
    if known:
        nerfacc.pack_info(ray_indices, 5)
    weights = torch.rand(6, dtype=torch.float64, device=device, requires_grad=True)
    values = torch.randn(6, 2, dtype=torch.float64, device=device, requires_grad=True)

    def accumulated(weights: Tensor, values: Tensor) -> Tensor:
        return nerfacc.accumulate_along_rays(weights, values, ray_indices, 5)

    # The sums of new indices are rounded in another order each time on a GPU.
    assert torch.autograd.gradcheck(accumulated, (weights, values), nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(accumulated, (weights, values), nondet_tol=1e-12)


def test_batched_accumulation(device: torch.device) -> None:
    weights, values = torch.rand(5, 7, device=device), torch.randn(5, 7, 3, device=device)
    near(nerfacc.accumulate_along_rays(weights, values), (weights[..., None].double() * values.double()).sum(1))
    near(nerfacc.accumulate_along_rays(weights), weights.double().sum(1, keepdim=True))
    outputs = torch.ones(5, 3, device=device)
    nerfacc.accumulate_along_rays_(weights, values, outputs=outputs)
    near(outputs, 1 + (weights[..., None].double() * values.double()).sum(1))


@pytest.mark.parametrize("by", ["sigma", "alpha"])
@pytest.mark.parametrize("background", [None, "one", "each"])
def test_rendering(by: str, background: str | None, device: torch.device) -> None:
    counts = [0, 3, 1, 0, 2]
    t_starts, t_ends, sigmas = samples_of(counts, device)
    t_ends = t_ends + 0.01
    ray_indices = rays_of(counts, device)
    alphas = 1 - torch.exp(-sigmas * (t_ends - t_starts))
    rgbs = torch.rand(6, 3, device=device, requires_grad=True)
    behind = {None: None, "one": torch.rand(3, device=device), "each": torch.rand(5, 3, device=device)}[background]
    functions = {f"rgb_{by}_fn": lambda *given: (rgbs, sigmas if by == "sigma" else alphas)}
    colors, opacities, depths, extras = nerfacc.rendering(
        t_starts, t_ends, ray_indices, 5, **functions, render_bkgd=behind, expected_depths=False
    )
    weights, trans = expected_weights(alphas, counts)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for i, ray in enumerate(ray_indices.tolist()):
        middle = 0.5 * (t_starts[i] + t_ends[i]).double().cpu()
        expected[ray] += weights[i] * torch.cat([rgbs[i].double().cpu(), torch.ones(1).double(), middle[None]]).detach()
    if behind is not None:
        expected[:, :3] += behind.double().cpu() * (1 - expected[:, 3:4])
    near(colors, expected[:, :3])
    near(opacities, expected[:, 3:4])
    near(depths, expected[:, 4:])
    assert set(extras) == {"weights", "trans", "alphas", "rgbs", *(["sigmas"] if by == "sigma" else [])}
    near(extras["weights"], weights)
    near(extras["trans"], trans)
    colors.sum().backward()
    assert rgbs.grad is not None
    near(rgbs.grad, weights[:, None].expand(-1, 3))
    means = nerfacc.rendering(t_starts, t_ends, ray_indices, 5, **functions)[2]
    near(means, expected[:, 4:] / expected[:, 3:4].clamp(min=1e-7), 512)


def test_rendering_of_a_batch_and_of_nothing(device: torch.device) -> None:
    t_starts, t_ends, sigmas = (x.view(4, 5) for x in samples_of([5] * 4, device))
    colors, opacities, depths, _ = nerfacc.rendering(
        t_starts, t_ends, rgb_sigma_fn=lambda a, b, none: (torch.ones(4, 5, 2, device=device), sigmas)
    )
    assert (colors.shape, opacities.shape, depths.shape) == ((4, 2), (4, 1), (4, 1))
    near(colors, opacities.expand(-1, 2))
    nothing = torch.zeros(0, device=device)
    indices = torch.zeros(0, dtype=torch.int64, device=device)
    colors, opacities, depths, _ = nerfacc.rendering(
        nothing,
        nothing,
        indices,
        3,
        rgb_sigma_fn=lambda *given: pytest.fail("called"),
        render_bkgd=torch.ones(3).to(device),
    )
    assert colors.tolist() == [[1.0] * 3] * 3
    assert opacities.tolist() == depths.tolist() == [[0.0]] * 3


def test_half_precision_is_computed_in_float32(device: torch.device) -> None:
    t_starts, t_ends, sigmas = samples_of([40], device)
    weights, _, _ = nerfacc.render_weight_from_density(t_starts[None], t_ends[None], sigmas[None].half())
    expected, _, _ = nerfacc.render_weight_from_density(t_starts[None], t_ends[None], sigmas[None].half().float())
    assert weights.dtype == torch.float32
    assert torch.equal(weights, expected)


INDICES = torch.tensor([0, 0, 1])
ONES = torch.ones(3)
WRONG = [
    (lambda: nerfacc.render_weight_from_alpha(ONES[:2], ray_indices=INDICES, n_rays=2), "ray_indices has shape"),
    (lambda: nerfacc.render_weight_from_alpha(ONES[:, None], ray_indices=INDICES, n_rays=2), "packed samples must"),
    (lambda: nerfacc.render_weight_from_alpha([1.0]), "alphas must be a torch.Tensor"),
    (lambda: nerfacc.render_weight_from_density(ONES, ONES[:, None], ONES), "t_ends has shape"),
    (lambda: nerfacc.render_weight_from_alpha(ONES, ray_indices=INDICES.float(), n_rays=2), "ray_indices must be"),
    (lambda: nerfacc.render_weight_from_alpha(ONES, packed_info=INDICES), "packed_info must have shape"),
    (lambda: nerfacc.render_weight_from_alpha(ONES, packed_info=torch.tensor([[0, 5]])), "offsets must"),
    (lambda: nerfacc.accumulate_along_rays(ONES, ONES, INDICES, 2), "values must have shape"),
    (lambda: nerfacc.accumulate_along_rays(ONES, None, INDICES), "n_rays must be"),
    (lambda: nerfacc.accumulate_along_rays(ONES, None, INDICES, -1), "n_rays must be"),
    (lambda: nerfacc.accumulate_along_rays_(ONES, None, INDICES), "outputs must be"),
    (lambda: nerfacc.accumulate_along_rays_(ONES, None, INDICES, torch.zeros(2, 3)), "outputs must have shape"),
    (lambda: nerfacc.rendering(ONES, ONES, INDICES, 2), "got neither"),
    (
        lambda: nerfacc.rendering(ONES, ONES, INDICES, 2, rgb_alpha_fn=lambda *x: (ONES, ONES)),
        "colours must have shape",
    ),
    (lambda: nerfacc.rendering(ONES, ONES, INDICES, rgb_alpha_fn=lambda *x: (ONES, ONES)), "n_rays must be given"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_told_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        call()
    assert "\n" not in str(error.value)
