"""All drop-ins: quick to import without a GPU, and right on two CUDA streams of two threads at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dreamfusion_fast
from dreamfusion_fast.integrations import nerfacc, raymarching, tinycudann

MOST_SECONDS = 0.1  # beyond torch; half of that on an idle core, and CI's may be busy
GRID = {"otype": "HashGrid", "n_levels": 4, "log2_hashmap_size": 12, "base_resolution": 4, "per_level_scale": 1.7}
MLP = {"otype": "FullyFusedMLP", "n_neurons": 32, "n_hidden_layers": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nerfacc", "raymarching", "gridencoder", "tinycudann"])
def test_importing_is_quick_and_needs_no_gpu(name: str) -> None:
    code = (
        "import time, torch, numpy; begin = time.process_time(); "
        f"import dreamfusion_fast.integrations.{name}; print(time.process_time() - begin)"
    )
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(dreamfusion_fast.__file__).parents[1]),
    }
    times = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        times.append(float(run.stdout))
    assert min(times) < MOST_SECONDS


def rays(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    origins = 2.0 * torch.nn.functional.normalize(torch.randn(1023, 3, generator=generator), dim=1)
    targets = torch.rand(1023, 3, generator=generator) - 0.5
    return origins.cuda(), torch.nn.functional.normalize(targets - origins, dim=1).cuda()


def by_nerfacc(seed: int) -> list[Tensor]:
    """Colours by nerfacc's names over tiny-cuda-nn's, and the gradient of all parameters."""
    origins, directions = rays(seed)
    field = tinycudann.NetworkWithInputEncoding(3, 4, GRID, MLP, seed=seed)
    estimator = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=16).cuda()
    estimator.binaries = torch.rand(1, 16, 16, 16, generator=torch.Generator().manual_seed(seed)).cuda() < 0.5
    index, starts, ends = estimator.sampling(origins, directions, render_step_size=0.02)
    middle = 0.5 * (starts + ends)[:, None]
    logits = field((origins[index] + middle * directions[index]) * 0.5 + 0.5).float()
    weights, _, _ = nerfacc.render_weight_from_density(
        starts, ends, torch.exp(1e3 * logits[:, 0]), ray_indices=index, n_rays=1023
    )
    color = nerfacc.accumulate_along_rays(weights, torch.sigmoid(logits[:, 1:]), index, 1023)
    (gradient,) = torch.autograd.grad(color.square().sum(), field.params)
    return [color.detach(), gradient]


def by_raymarching(seed: int) -> list[Tensor]:
    """Colours by raymarching's names, and the gradient of the densities."""
    origins, directions = rays(seed)
    box = torch.tensor([-1.0, -1, -1, 1, 1, 1], device="cuda")
    nears, fars = raymarching.near_far_from_aabb(origins, directions, box, 0.2)
    grid = torch.rand(1, 16**3, generator=torch.Generator().manual_seed(seed)).cuda()
    bitfield = raymarching.packbits(grid, 0.5)
    places, _, ts, found = raymarching.march_rays_train(
        origins, directions, 1.0, bitfield, 1, 16, nears, fars, False, 0.0, 256
    )
    density = places.square().sum(dim=1).requires_grad_()
    _, opacity, depth, image = raymarching.composite_rays_train(density, places.sigmoid(), ts, found, 1e-4)
    (gradient,) = torch.autograd.grad(image.square().sum() + opacity.sum(), density)
    return [image.detach(), depth.detach(), gradient]


@pytest.mark.gpu
@pytest.mark.parametrize("step", [by_nerfacc, by_raymarching])
def test_two_streams_of_two_threads(step) -> None:
    wanted = [step(seed) for seed in (1, 2)]
    found: list[list[list[Tensor]]] = [[], []]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(10):
                    found[number].append(step(number + 1))
            stream.synchronize()
        except BaseException as error:  # shown by the thread that waits
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for results, expected in zip(found, wanted, strict=True):
        assert len(results) == 10
        for result in results:
            for one, other in zip(result, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
