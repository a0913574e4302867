"""The embedded prior's network on a CPU: the function of `PriorNetwork`, whatever of the architecture may vary."""

from __future__ import annotations

import pytest
import torch

from dreamfusion_fast.guidance.models.embedded.cpu_network import CpuNetwork, cpu_network_serves
from dreamfusion_fast.guidance.models.embedded.model import CONDITION_WIDTH, UNET_CONFIG, PriorNetwork
from dreamfusion_fast.networks.dense import dense_serves

pytestmark = pytest.mark.skipif(not dense_serves(), reason="the CPU core was not compiled for AVX2 and FMA")

SMALL = UNET_CONFIG | {"block_out_channels": (16, 32, 48), "norm_num_groups": 4, "attention_head_dim": 2}
OTHER = UNET_CONFIG | {"block_out_channels": (32, 16, 16), "norm_num_groups": 2, "attention_head_dim": 4}


def network(config) -> PriorNetwork:
    """Random weights, none of them zero or one as those of norms begin."""
    made = PriorNetwork(config)
    for parameter in made.parameters():
        spread = 0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2
        parameter.data += spread * torch.randn_like(parameter)
    return made.eval().requires_grad_(False)


def arguments(n: int, times: int = 2):
    """Images and timesteps of `n` views, tokens and conditions of `times` as many."""
    noisy, t = torch.randn(n, 3, 64, 64), torch.randint(0, 1000, (n,))
    return noisy, t, torch.randn(times * n, 20, 384), torch.randn(times * n, CONDITION_WIDTH)


@pytest.mark.parametrize("config", [SMALL, OTHER])
@pytest.mark.parametrize(("n", "times"), [(1, 2), (3, 2), (2, 1), (1, 5)])
def test_is_the_network(config, n, times):
    plain = network(config)
    assert cpu_network_serves(plain)
    noisy, t, tokens, condition = arguments(n, times)
    found = CpuNetwork(plain)(noisy, t, tokens, condition)
    wide = (tensor.double() for tensor in (noisy.repeat(times, 1, 1, 1), tokens, condition))
    image, tokens, condition = wide
    expected = plain.double()(image, t.repeat(times), tokens, condition)
    assert found.shape == (times * n, 3, 64, 64)
    error = (found - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-5


def test_same_call_same_bits():
    fast, given = CpuNetwork(network(SMALL)), arguments(2)
    assert torch.equal(fast(*given), fast(*given))


@pytest.mark.parametrize("what", ["widths", "float64"])
def test_other_networks_are_left_to_torch(what):
    made = PriorNetwork(SMALL | {"block_out_channels": (8, 8, 16)} if what == "widths" else SMALL)
    assert not cpu_network_serves(made.double() if what == "float64" else made)
