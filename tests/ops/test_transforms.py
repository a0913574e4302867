"""torch.func: derivatives are refused in one line, vmap runs ops without lists in a loop, and the twins do both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamfusion_fast import ops

LEVEL_OFFSETS, RESOLUTIONS = ops.hash_grid_layout(levels=2, base_resolution=3, finest_resolution=7, log2_rows=6)
OFFSETS = torch.tensor([0, 3, 3, 11], dtype=torch.int32)


def make(twin: bool) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Of each differentiable op, a function of one of its arguments, and a value of that."""
    suffix = "_reference" if twin else ""
    composite, hash_grid = getattr(ops, f"composite{suffix}"), getattr(ops, f"hash_grid{suffix}")
    gradient = getattr(ops, f"hash_grid_position_gradient{suffix}")
    triplane, slopes = getattr(ops, f"triplane{suffix}"), getattr(ops, f"triplane_position_gradient{suffix}")
    mlp, both = getattr(ops, f"mlp{suffix}"), getattr(ops, f"mlp_with_input_gradient{suffix}")
    t = torch.rand(11).sort().values
    weights = [torch.randn(16, 5), torch.randn(4, 16)]
    table = torch.randn(int(LEVEL_OFFSETS[-1]), 2)
    values = torch.rand(11, 3)
    planes, scenes = torch.randn(2, 3, 4, 5, 2), torch.randint(0, 2, (11,))
    return {
        "composite": (lambda x: composite(x, values, t, 0.1, OFFSETS)[3], torch.rand(11)),
        "hash_grid": (lambda x: hash_grid(x, table, LEVEL_OFFSETS, RESOLUTIONS), torch.rand(11, 3)),
        "hash_grid_position_gradient": (
            lambda x: gradient(x, values, table, LEVEL_OFFSETS, RESOLUTIONS),
            torch.rand(11, 4),
        ),
        "triplane": (lambda x: triplane(x, planes, scenes, 2), torch.rand(11, 3)),
        "triplane_position_gradient": (lambda x: slopes(x, values, planes, scenes), torch.rand(11, 6)),
        "mlp": (lambda x: mlp(x, weights, None), torch.rand(11, 5)),
        "mlp_with_input_gradient": (lambda x: both(x, weights, None)[1], torch.rand(11, 5)),
    }


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        *((name, transform) for name in make(False) for transform in ("grad", "jvp", "vmap of grad", "grad of vmap")),
        ("mlp", "vmap"),
        ("mlp_with_input_gradient", "vmap"),
    ],
)
def test_what_does_not_go_through_is_refused_in_one_line(name: str, transform: str) -> None:
    function, x = make(False)[name]

    def total(x: Tensor) -> Tensor:
        return function(x).sum()

    run = {
        "grad": lambda: torch.func.grad(total)(x),
        "jvp": lambda: torch.func.jvp(total, (x,), (x,)),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(total))(x.expand(2, *x.shape)),
        "grad of vmap": lambda: torch.func.grad(lambda y: torch.vmap(total)(y).sum())(x.expand(2, *x.shape)),
        "vmap": lambda: torch.vmap(function)(x.expand(2, *x.shape)),
    }[transform]
    with pytest.raises(RuntimeError, match=rf"^{name}: torch.(func.grad|vmap).*the twin, {name}_ref.*$"):
        run()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in make(False) if "mlp" not in name])
def test_vmap_gives_what_a_loop_gives(name: str) -> None:
    function, x = make(False)[name]
    batch = torch.stack([x, 0.5 * x, x.flip(0)])
    assert torch.equal(torch.vmap(function)(batch), torch.stack([function(row) for row in batch]))


@pytest.mark.parametrize("name", make(True))
def test_twins_take_part(name: str) -> None:
    function, x = make(True)[name]
    x.requires_grad_(True)
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(lambda x: function(x).sum())(x), expected)
    if name == "mlp_with_input_gradient":
        return  # differentiates by torch.autograd within, which vmap does not know
    batch = torch.stack([x, 0.5 * x, x.flip(0)])
    torch.testing.assert_close(torch.vmap(function)(batch), torch.stack([function(row) for row in batch]))


@pytest.mark.parametrize("name", make(False))
def test_ops_compile_into_one_graph(name: str) -> None:
    function, x = make(False)[name]
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))
