"""The module that stands for the compiled `_raymarching`, and how both come to stand where they are imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from raymarching_cases import scene

from dreamfusion_fast.integrations import raymarching
from dreamfusion_fast.integrations.raymarching import backend, torch_ngp


def test_the_compiled_module_of_stable_dreamfusion(device: torch.device) -> None:
    """What the wrappers of the project call, with the tensors that they make."""
    n, bound, size, cascades = 113, 2.0, 8, 2
    origins, directions, grid, _ = scene(n, bound, size, cascades, device)
    nears, fars, coords = (torch.empty(n, *shape, device=device) for shape in ((), (), (2,)))
    backend.near_far_from_aabb(
        origins, directions, torch.tensor([-2.0] * 3 + [2.0] * 3, device=device), n, 0.2, nears, fars
    )
    backend.sph_from_ray(origins, directions, 9.0, n, coords)
    assert torch.equal(coords, raymarching.sph_from_ray(origins, directions, 9.0))
    bits = torch.empty(cascades * size**3 // 8, dtype=torch.uint8, device=device)
    backend.packbits(grid, bits.numel(), 0.7, bits)
    cells = torch.randint(0, size, (n, 3), dtype=torch.int32, device=device)
    indices, back = torch.empty_like(cells[:, 0]), torch.empty_like(cells)
    backend.morton3D(cells, n, indices)
    backend.morton3D_invert(indices, n, back)
    assert torch.equal(back, cells)

    rays, counter = (
        torch.empty(n, 2, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    noises = torch.zeros(n, device=device)
    start = (origins, directions, bits, bound, False, 0.01, 128, n, cascades, size, nears, fars)
    backend.march_rays_train(*start, None, None, None, rays, counter, noises)
    m = counter.item()
    xyzs, dirs, ts = (torch.zeros(m, width, device=device) for width in (3, 3, 2))
    backend.march_rays_train(*start, xyzs, dirs, ts, rays, counter, noises)
    plain = raymarching.march_rays_train(
        origins, directions, bound, bits, cascades, size, nears, fars, False, 0.01, 128
    )
    assert m > 100
    for a, e in zip((xyzs, dirs, ts, rays), plain, strict=True):
        assert torch.equal(a, e)
    flat = torch.zeros(m, dtype=torch.int32, device=device)
    backend.flatten_rays(rays, n, m, flat)
    assert torch.equal(flat, raymarching.flatten_rays(rays, m))

    sigmas, rgbs = 9 * torch.rand(m, device=device), torch.rand(m, 3, device=device)
    inputs = [x.clone().requires_grad_() for x in (sigmas, rgbs)]
    expected = raymarching.composite_rays_train(*inputs, *plain[2:], 1e-3)
    outputs = [torch.full_like(x, 7.0) for x in expected]
    backend.composite_rays_train_forward(sigmas, rgbs, ts, rays, m, n, 1e-3, False, *outputs)
    grads = [torch.randn_like(x) for x in expected]
    found = [torch.zeros_like(x) for x in inputs]
    state = (sigmas, rgbs, ts, rays, *outputs[1:], m, n, 1e-3)
    for options in ((False,), ()):  # before and after binarize
        backend.composite_rays_train_backward(*grads, *state, *options, *found)
        wanted = torch.autograd.grad(expected, inputs, grads, retain_graph=True)
        for a, e in zip((*outputs, *found), (*expected, *wanted), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)

    alive, t = torch.arange(n, dtype=torch.int32, device=device), nears.clone()
    more = [torch.zeros(4 * n, width, device=device) for width in (3, 3, 2)]
    march_numbers = (bound, False, 0.01, 128, cascades, size, bits, nears, fars)
    backend.march_rays(n, 4, alive, t, origins, directions, *march_numbers, *more, noises)
    options = (bits, cascades, size, nears, fars, False, 0.01, 128)
    for a, e in zip(more, raymarching.march_rays(n, 4, alive, t, origins, directions, bound, *options), strict=True):
        assert torch.equal(a, e)
    states = []
    for run in (backend.composite_rays, raymarching.composite_rays):
        held = [alive.clone(), t.clone(), *(torch.zeros(n, *shape, device=device) for shape in ((), (), (3,)))]
        samples = (sigmas[: 4 * n], rgbs[: 4 * n], more[2])
        if run is backend.composite_rays:
            run(n, 4, 1e-2, False, *held[:2], *samples, *held[2:])
        else:
            run(n, 4, *held[:2], *samples, *held[2:], 1e-2, False)
        states.append(held)
    assert all(torch.equal(a, e) for a, e in zip(*states, strict=True))


def test_the_compiled_module_of_torch_ngp(device: torch.device) -> None:
    n, bound, size, cascades, room = 113, 2.0, 8, 2, 5000
    origins, directions, _, bits = scene(n, bound, size, cascades, device)
    nears, fars = raymarching.near_far_from_aabb(
        origins, directions, torch.tensor([-2.0] * 3 + [2.0] * 3, device=device)
    )
    xyzs, dirs, deltas = (torch.zeros(room, width, device=device) for width in (3, 3, 2))
    rays, counter = (
        torch.empty(n, 3, dtype=torch.int32, device=device),
        torch.zeros(2, dtype=torch.int32, device=device),
    )
    start = (origins, directions, bits, bound, 0.01, 128, n, cascades, size, room, nears, fars)
    backend.march_rays_train(*start, xyzs, dirs, deltas, rays, counter, False)
    given = (origins, directions, bound, bits, cascades, size, nears, fars)
    plain = torch_ngp.march_rays_train(*given, None, -1, False, -1, False, 0.01, 128)
    m = len(plain[0])
    assert counter.tolist() == [m, n]
    assert 100 < m < room
    for a, e in zip((xyzs[:m], dirs[:m], deltas[:m], rays), plain, strict=True):
        assert torch.equal(a, e)

    sigmas, rgbs = 9 * torch.rand(room, device=device), torch.rand(room, 3, device=device)
    inputs = [x.clone().requires_grad_() for x in (sigmas, rgbs)]
    expected = torch_ngp.composite_rays_train(*inputs, deltas, rays)
    outputs = [torch.empty_like(x) for x in expected]
    backend.composite_rays_train_forward(sigmas, rgbs, deltas, rays, room, n, 1e-4, *outputs)
    grads = [torch.randn_like(expected[0]), torch.randn_like(expected[2])]
    found = [torch.zeros_like(x) for x in inputs]
    state = (sigmas, rgbs, deltas, rays, outputs[0], outputs[2], room, n, 1e-4)
    backend.composite_rays_train_backward(*grads, *state, *found)
    wanted = torch.autograd.grad((expected[0], expected[2]), inputs, grads)
    for a, e in zip((*outputs, *found), (*expected, *wanted), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)

    alive, t = torch.arange(n, dtype=torch.int32, device=device), nears.clone()
    more = [torch.zeros(4 * n, width, device=device) for width in (3, 3, 2)]
    numbers = (bound, 0.01, 128, cascades, size, bits, nears, fars)
    backend.march_rays(n, 4, alive, t, origins, directions, *numbers, *more, torch.zeros(n, device=device))
    options = (bits, cascades, size, nears, fars, -1, False, 0.01, 128)
    for a, e in zip(more, torch_ngp.march_rays(n, 4, alive, t, origins, directions, bound, *options), strict=True):
        assert torch.equal(a, e)
    sums = [torch.zeros(n, *shape, device=device) for shape in ((), (), (3,))]
    backend.composite_rays(n, 4, 1e-2, alive, t, sigmas[: 4 * n], rgbs[: 4 * n], more[2], *sums)
    assert (alive >= 0).sum() < n
    assert sums[0].max() > 0.5
    with pytest.raises(TypeError, match="composite_rays: arguments must be 10 or 11 or 12, got 3"):
        backend.composite_rays(1, 2, 3)


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_installing() -> None:
    assert importlib.util.find_spec("_raymarching") is None
    code = """
from dreamfusion_fast.integrations import raymarching as ours
import sys, types
print(ours.install(), ours.install())
import raymarching, _raymarching
print(raymarching.march_rays_train is ours.march_rays_train, _raymarching.march_rays.__module__)
sys.modules["raymarching"] = types.ModuleType("raymarching")
print(ours.install(flavour="torch-ngp"))
print(ours.install(force=True, flavour="torch-ngp"))
import raymarching
print(raymarching.__name__)
try:
    ours.install(flavour="x")
except ValueError as error:
    print(error)
"""
    assert run_python(code).splitlines() == [
        "['raymarching', '_raymarching'] ['raymarching', '_raymarching']",
        "True dreamfusion_fast.integrations.raymarching.backend",
        "['_raymarching']",
        "['raymarching', '_raymarching']",
        "dreamfusion_fast.integrations.raymarching.torch_ngp",
        "install: flavour must be stable-dreamfusion or torch-ngp, got 'x'",
    ]


def test_importing_brings_next_to_nothing_along() -> None:
    """What takes long, the ops, comes with the first function; of torch nothing comes that `import torch` has not."""
    code = """
import sys, torch
before = set(sys.modules)
import dreamfusion_fast.integrations.raymarching.backend
from dreamfusion_fast.integrations import raymarching
print(raymarching.install())
own = {name for name in set(sys.modules) - before if name.startswith("dreamfusion_fast")}
print(len(set(sys.modules) - before - own) < 20, "dreamfusion_fast.ops" in own)
raymarching.morton3D
new = set(sys.modules) - before
print("dreamfusion_fast.ops" in new, [name for name in new if name.startswith(("triton", "torch._dynamo", "scipy"))])
print(any(name.startswith("dreamfusion_fast.rendering") for name in new), hasattr(raymarching, "nothing"))
print(set(raymarching.__all__) <= set(dir(raymarching)))
"""
    assert run_python(code).splitlines() == [
        "['raymarching', '_raymarching']",
        "True False",
        "True []",
        "False False",
        "True",
    ]
