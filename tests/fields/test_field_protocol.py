"""Any callable is a field: evaluate and query_density."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.fields import Field, FieldOutput, evaluate, hash_field, query_density, safe_normalize
from dreamfusion_fast.fields.base import FieldLike
from dreamfusion_fast.rendering import VolumeRenderer


def ball(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Density falls off with the distance from the origin."""
    return torch.exp(-positions.square().sum(dim=1)), positions.sigmoid()


def constant(positions: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones(positions.shape[0]), torch.ones_like(positions)


def test_a_pair_becomes_a_field_output() -> None:
    x = torch.randn(7, 3)
    output = evaluate(ball, x)
    assert isinstance(output, FieldOutput)
    torch.testing.assert_close(output.density, ball(x)[0])
    torch.testing.assert_close(query_density(ball, x), ball(x)[0])


@pytest.mark.parametrize("count", [0, 1, 113])
def test_normals_by_autograd(count: int) -> None:
    x = torch.randn(count, 3)
    normal = evaluate(ball, x, with_normal=True).normal
    torch.testing.assert_close(normal, x / x.norm(dim=1, keepdim=True))
    with torch.no_grad():
        output = evaluate(ball, x, with_normal=True)
    assert not any(t.requires_grad for t in (output.density, output.color, output.normal))
    torch.testing.assert_close(output.normal, normal)


LEARNED = torch.ones((), requires_grad=True)
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("made_in", MODES)
def test_normals_are_the_same_in_all_modes(mode: str, made_in: str) -> None:
    layer = torch.nn.Linear(3, 1).double()
    with MODES[made_in]():
        x = torch.linspace(-1, 1, 33, dtype=torch.float64).view(11, 3).sin()
    with MODES[mode]():
        output = evaluate(lambda p: (layer(p)[:, 0].exp(), p.sigmoid()), x, with_normal=True)
    expected = -layer.weight.detach() / layer.weight.detach().norm()
    torch.testing.assert_close(output.normal.detach(), expected.expand(11, 3), rtol=1e-12, atol=0)
    assert output.normal.requires_grad == output.density.requires_grad == (mode == "grad")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "field",
    [
        constant,
        torch.no_grad()(ball),
        torch.inference_mode()(ball),
        lambda x: ball(x.detach()),
        lambda x: (LEARNED * ball(x.detach())[0], x),
        lambda x: (50.0 * (x.norm(dim=1) < 0.5), x),
    ],
    ids=["constant", "no_grad", "inference_mode", "detached", "learned scale", "comparison"],
)
def test_normals_of_a_density_without_a_graph_are_an_error(field: FieldLike, mode: str) -> None:
    x = torch.randn(5, 3)
    with MODES[mode]():
        assert evaluate(field, x).normal is None
        with pytest.raises(
            ValueError, match=r"^field: its density has no graph to the positions.*want one without no_grad"
        ):
            evaluate(field, x, with_normal=True)


def test_normals_of_a_flat_density_are_zero() -> None:
    output = evaluate(lambda x: (3 + 0 * x.sum(dim=1), x), torch.randn(5, 3), with_normal=True)
    assert (output.density == 3).all()
    assert (output.normal == 0).all()


def test_a_normal_that_the_field_gives_is_used() -> None:
    up = torch.tensor([0.0, 1.0, 0.0])
    output = evaluate(lambda x: FieldOutput(*ball(x), up.expand_as(x)), torch.randn(5, 3), with_normal=True)
    assert torch.equal(output.normal, up.expand(5, 3))


def test_density_method_of_the_class_is_preferred() -> None:
    class Slow:
        def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
            raise AssertionError("the colour was not asked for")

    class Both(Slow):
        def density(self, positions: Tensor) -> Tensor:
            return torch.full((positions.shape[0],), 7.0)

    class Derived(Both):
        pass

    for field in (Both(), Derived()):
        assert query_density(field, torch.zeros(2, 3)).tolist() == [7.0, 7.0]


class Base(torch.nn.Module):
    """Density 1, by its method and in a call."""

    def density(self, positions: Tensor) -> Tensor:
        return torch.ones(positions.shape[0])

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(positions.shape[0]), torch.ones_like(positions)


class Twice(Base):
    """Overrides forward only."""

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        density, color = super().forward(positions)
        return 2 * density, color


class Submodule(torch.nn.Module):
    """Calls something else density."""

    def __init__(self) -> None:
        super().__init__()
        self.density = torch.nn.Linear(3, 1)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return (2 + 0 * self.density(positions)[:, 0]), torch.ones_like(positions)


class Inherits(Field):
    """Leaves density to the base, and returns a pair."""

    def forward(self, positions: Tensor, with_normal: bool = False) -> tuple[Tensor, Tensor]:
        return torch.full((positions.shape[0],), 2.0), torch.ones_like(positions)


def hooked() -> Base:
    field = Base()
    field.register_forward_hook(lambda module, inputs, output: (2 * output[0], output[1]))
    return field


def with_attribute(name: str, value: object, field: torch.nn.Module) -> torch.nn.Module:
    setattr(field, name, value)
    return field


@pytest.mark.parametrize(
    "field",
    [
        Twice(),
        Submodule(),
        Inherits(),
        hooked(),
        with_attribute("density", lambda x: x[:, 0], Twice()),
        with_attribute("density", 7.0, Inherits()),
        with_attribute("forward", Twice().forward, Base()),
        with_attribute("density", lambda x: x[:, 0], torch.nn.Sequential(Twice())),
    ],
    ids=lambda field: type(field).__name__,
)
def test_density_is_that_of_a_call(field: torch.nn.Module) -> None:
    """Whatever else is named density."""
    assert query_density(field, torch.randn(3, 3)).tolist() == [2.0] * 3


def test_overriding_density_without_forward_is_an_error() -> None:
    class Half(Base):
        def density(self, positions: Tensor) -> Tensor:
            return 0.5 * super().density(positions)

    for use in (lambda: query_density(Half(), torch.zeros(2, 3)), lambda: VolumeRenderer(Half())):
        with pytest.raises(ValueError, match=r"^field: Half overrides density of Base but not forward.*want both"):
            use()


def test_a_field_that_leaves_out_its_normals_is_an_error() -> None:
    assert evaluate(Inherits(), torch.zeros(2, 3)).density.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match=r"^field: Inherits returned no normal"):
        evaluate(Inherits(), torch.zeros(2, 3), with_normal=True)


def test_safe_normalize_is_finite_everywhere() -> None:
    x = torch.tensor([[0.0, 0, 0], [3.0, 4, 0], [1e-30, 0, 0]], dtype=torch.float64, requires_grad=True)
    y = safe_normalize(x)
    torch.testing.assert_close(y[1], torch.tensor([0.6, 0.8, 0], dtype=torch.float64))
    assert torch.equal(y[0], torch.zeros(3, dtype=torch.float64))
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (lambda x: x[:, 0], r"returned Tensor, want FieldOutput or"),
        (lambda x: (x, x), r"returned density \[4, 3\] for 4 positions, want \[4\]"),
        (lambda x: (x[:, 0], x[:, :2]), r"returned colour \[4, 2\] for 4 positions, want \[4, 3\]"),
        (lambda x: (x[:, 0], x, x), r"returned a tuple of 3, want \(density \[m\], colour \[m, 3\]\), or a Field"),
        (lambda x: FieldOutput(x[:, 0], x, x[:, :2]), r"returned normal \[4, 2\]"),
        (lambda x: FieldOutput(alpha=x, color=x), r"returned alpha \[4, 3\]"),
        (lambda x: FieldOutput(x[:, 0], x, channels={"a": x[:3]}), r"channels\['a'\] \[3, 3\] for 4 positions"),
        (lambda x: FieldOutput(x[:, 0], x, alpha=x[:, 0]), "got density and alpha, want one of them"),
        (lambda x: FieldOutput(color=x), "got neither density nor alpha, want one of them"),
        (lambda x: FieldOutput(x[:, 0]), "FieldOutput.color: got None"),
    ],
)
def test_wrong_returns_are_named(field: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(field, torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (lambda x: (1.0, x), "returned density float, want a tensor"),
        (lambda x: (x[:, 0], x.tolist()), "returned colour list, want a tensor"),
        (lambda x: FieldOutput(x[:, 0], x, channels={"a": 1}), r"returned channels\['a'\] int, want a tensor"),
        (lambda x: FieldOutput(x[:, 0], x, channels=[x]), "returned channels list, want tensors by name"),
    ],
)
def test_returns_that_are_no_tensors_are_named(field: object, message: str) -> None:
    with pytest.raises(TypeError, match=f"field: {message}"):
        evaluate(field, torch.zeros(4, 3))


@pytest.mark.parametrize("narrow", [torch.float16, torch.float64])
def test_all_that_a_field_returns_is_in_the_dtype_of_the_positions(narrow: torch.dtype) -> None:
    def field(x: torch.Tensor) -> FieldOutput:
        x = x.to(narrow)
        return FieldOutput(x[:, :1], x, x, channels={"a": x[:, 0]})

    output = evaluate(field, torch.ones(4, 3), with_normal=True)
    every = (output.density, output.color, output.normal, output.channels["a"])
    assert {tensor.dtype for tensor in every} == {torch.float32}


def test_docstring_examples() -> None:
    assert doctest.testmod(hash_field, raise_on_error=False).failed == 0
