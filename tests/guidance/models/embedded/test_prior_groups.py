"""The embedded prior reads several views together: attention across a group, on each of its ways, and as guidance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import write_tiny_prior
from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig, GuidanceRequest, Views, create_guidance
from dreamfusion_fast.guidance.methods import SdiConfig
from dreamfusion_fast.guidance.models.embedded.cpu_network import CpuNetwork
from dreamfusion_fast.guidance.models.embedded.guide import EmbeddedPrior
from dreamfusion_fast.guidance.models.embedded.model import CONDITION_WIDTH, UNET_CONFIG, PriorNetwork, load_prior
from dreamfusion_fast.guidance.models.embedded.sample import sample_images
from dreamfusion_fast.guidance.models.embedded.unet import _TransformerBlock
from dreamfusion_fast.networks.dense import dense_serves
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.presets import is_small

CONFIG = UNET_CONFIG | {"block_out_channels": (16, 16, 32), "norm_num_groups": 4, "attention_head_dim": 2}


def network(views: int) -> PriorNetwork:
    """Random weights, the same for any number of views, none of them zero or one as those of norms begin."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = PriorNetwork(CONFIG | {"views": views})
        for parameter in made.parameters():
            spread = 0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2
            parameter.data += spread * torch.randn_like(parameter)
    return made.eval().requires_grad_(False)


def arguments(n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(n, *shape, generator=g).to(dtype) for shape in ((3, 32, 32), (20, 384), (CONDITION_WIDTH,))]
    return [values[0], torch.randint(0, 1000, (n,), generator=g), *values[1:]]


def rows(values: list[Tensor], index: Any) -> list[Tensor]:
    return [value[index] for value in values]


def test_attention_is_over_all_pixels_of_the_group() -> None:
    """One block against sums that are written out, in float64."""
    torch.manual_seed(2)
    width, heads, group, pixels = 12, 3, 3, 5
    block = _TransformerBlock(width, heads, 7).double()
    for parameter in block.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, tokens = torch.randn(2 * group, pixels, width).double(), torch.randn(2 * group, 4, 7).double()
    own, first = block.norm1(x), block.attn1
    expected = torch.zeros_like(x)
    for image in range(2 * group):
        others = range(image // group * group, image // group * group + group)
        keys = torch.cat([first.to_k(own[other]) for other in others])
        values = torch.cat([first.to_v(own[other]) for other in others])
        query = first.to_q(own[image])
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            weights = (query[:, part] @ keys[:, part].T / math.sqrt(width // heads)).exp()
            expected[image, :, part] = weights / weights.sum(1, keepdim=True) @ values[:, part]
    expected = x + first.to_out[0](expected)
    expected = expected + block.attn2(block.norm2(expected), tokens)
    expected = expected + block.ff(block.norm3(expected))
    torch.testing.assert_close(block(x, tokens, group), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_groups_see_their_own_views_alone() -> None:
    many, given = network(4).double(), arguments(8)
    out = many(*given, 4)
    # A view of another group changes nothing, and one of its own changes all four.
    other = [value.clone() for value in given]
    other[0][5] += 1.0
    changed = (many(*other, 4) - out).abs().amax((1, 2, 3))
    assert bool((changed[:4] == 0).all())
    assert bool((changed[4:] > 1e-4).all())
    # The order of views says nothing: only their conditions tell them apart.
    turned = torch.tensor([2, 0, 3, 1, 4, 5, 6, 7])
    torch.testing.assert_close(many(*rows(given, turned), 4), out[turned], rtol=0, atol=1e-12)
    # A view that sees only views like itself sees what it sees alone.
    alike = rows(given, [3, 3, 3, 3])
    torch.testing.assert_close(many(*alike, 4), many(*alike), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_group_of_one_is_the_network_of_single_views() -> None:
    """To the bit, in both implementations; so weights of single views are a start for several."""
    one, many, given = network(1), network(4), arguments(3, dtype=torch.float32)
    expected = one(*given)
    assert torch.equal(many(*given), expected)
    assert torch.equal(one(*given, 1), expected)
    if dense_serves():
        assert torch.equal(CpuNetwork(many)(*given), CpuNetwork(one)(*given))


@pytest.mark.skipif(not dense_serves(), reason="the CPU core was not compiled for AVX2 and FMA")
@pytest.mark.parametrize(("views", "groups", "times"), [(4, 1, 2), (2, 3, 1), (3, 1, 5), (4, 2, 2)])
def test_cpu_network_is_the_network(views: int, groups: int, times: int) -> None:
    """Under several conditions, none of which sees another's views."""
    plain, n = network(views), groups * views
    noisy, t, tokens, condition = arguments(times * n, dtype=torch.float32)
    found = CpuNetwork(plain)(noisy[:n], t[:n], tokens, condition, views)
    exact, start = plain.double(), 0
    for start in range(0, times * n, n):
        here = slice(start, start + n)
        expected = exact(noisy[:n].double(), t[:n], tokens[here].double(), condition[here].double(), views)
        error = (found[here] - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-5


def test_gradients_go_across_the_views() -> None:
    many = network(2).double()
    noisy, *rest = arguments(4)
    noisy.requires_grad_(True)
    out = many(noisy, *rest, 2)
    (gradient,) = torch.autograd.grad(out[0].sum(), noisy)
    sizes = gradient.abs().amax((1, 2, 3))
    assert bool((sizes[:2] > 1e-6).all())
    assert bool((sizes[2:] == 0).all())
    direction = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(3)).double()
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (many(noisy + sign * step * direction, *rest, 2)[0].sum() for sign in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float((ahead - behind) / (2 * step)), rel=1e-6)


@pytest.mark.parametrize(
    ("group", "images", "message"),
    [
        (2, 4, "group: got 2, want 1 or 4"),
        (4, 6, "group: got 4 for 6 images, want a divisor"),
        (0, 4, "group: got 0, want 1 or 4"),
    ],
)
def test_other_groups_are_refused(group: int, images: int, message: str) -> None:
    made, given = network(4), arguments(images, dtype=torch.float32)
    for evaluate in (made, *([CpuNetwork(made)] if dense_serves() else [])):
        with pytest.raises(ValueError, match=message):
            evaluate(*given, group)


@pytest.mark.parametrize("views", [0, 17, 2.0, True, None, "4"])
def test_other_numbers_of_views_are_refused(views: Any) -> None:
    with pytest.raises(ValueError, match=r"views: got .*, want a whole number from 1 to 16"):
        PriorNetwork(CONFIG | {"views": views})


# As guidance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_prior(tmp_path_factory.mktemp("own") / "prior", views=4)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_prior(tmp_path_factory.mktemp("pairs") / "prior", views=2)


def test_the_file_says_how_many(folder: Path, tmp_path: Path) -> None:
    assert load_prior(folder).config["views"] == EmbeddedPrior("cpu", folder=folder).views_per_group == 4
    assert EmbeddedPrior("cpu").views_per_group == 1  # the package's own, which does not say


def test_a_folder_is_a_name(folder: Path) -> None:
    config = GuidanceConfig(name=str(folder), dtype="float32", cache=False)
    guidance = create_guidance(config)
    assert guidance.views_per_group == 4
    assert list(guidance.files) == [str(folder / "prior.safetensors.gz")]  # so a resumed run says if it has changed
    assert is_small(str(folder))
    assert Config.for_guidance(str(folder)) == Config(guidance=GuidanceConfig(name=str(folder)))
    embeddings = guidance.embed("a chair")
    azimuth = torch.arange(8) * math.pi / 2
    views = Views(azimuth, torch.zeros(8), torch.ones(8, 3), group=4)
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def pull(**options: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        return guidance.gradient(GuidanceRequest(images, embeddings, views, generator=generator, **options))

    whole = pull()
    assert whole.t[:4].unique().numel() == whole.t[4:].unique().numel() == 1
    torch.testing.assert_close(pull(views_per_call=4).gradient, whole.gradient, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"views\.group: got 1, want 4"):
        guidance.gradient(GuidanceRequest(images, embeddings, Views(azimuth, torch.zeros(8))))


@pytest.mark.quick(1)
@pytest.mark.parametrize("mode", ["sds", "csd", "ism", "sdi", "vsd"])
def test_all_methods_pull_groups(pairs: Path, mode: Any) -> None:
    """As if each group were alone: methods ask at timesteps of their own, and never with a part of a group."""
    if mode == "vsd":
        pytest.importorskip("peft")
    config = GuidanceConfig(
        name=str(pairs), dtype="float64", cache=False, mode=mode, second_mode=mode, perp_neg=mode == "sds",
        sdi=SdiConfig(steps=4),
    )  # fmt: skip
    guidance = create_guidance(config)
    embeddings = guidance.embed("a chair")
    g = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 64, 64, generator=g, dtype=torch.float64)
    azimuth = torch.rand(4, generator=g, dtype=torch.float64) * 6  # shares of the sides as exact as the rest
    views = Views(azimuth, torch.zeros_like(azimuth), torch.ones(4, 3), group=2)

    def pull(**options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        request = GuidanceRequest(images, embeddings, views, (0.5, 0.5), generator=generator, **options)
        return guidance.gradient(request).gradient

    whole = pull()
    assert bool(whole.isfinite().all())
    assert bool((whole.abs().amax((1, 2, 3)) > 0).all())
    torch.testing.assert_close(pull(views_per_call=3), whole, rtol=1e-9, atol=1e-9 * float(whole.abs().max()))
    images[0] = images[0].flip(-1)  # the others of its group see that, those of the next do not
    moved = (pull() - whole).abs().amax((1, 2, 3))
    assert bool((moved[:2] > 1e-6 * whole.abs().max()).all())
    assert float(moved[2:].max()) < 1e-9 * float(whole.abs().max())


def test_samples_are_rows_of_views(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    evaluate = EmbeddedPrior.evaluate

    def noted(self: EmbeddedPrior, noisy: Tensor, t: Tensor, condition: Any, known: Any, group: int = 1) -> Tensor:
        asked.append(known.azimuth)
        assert group == (1 if known.azimuth is None else 4)
        return evaluate(self, noisy, t, condition, known, group)

    monkeypatch.setattr(EmbeddedPrior, "evaluate", noted)
    images = sample_images("a chair", n=2, steps=1, folder=folder)
    assert images.shape == (2, 64, 256, 3)
    expected = torch.tensor([0, 90, 180, 270, 0, 90, 180, 270]).deg2rad()
    torch.testing.assert_close(asked[0], expected)
    assert sample_images("a chair, side view", n=3, steps=1, folder=folder).shape == (3, 64, 64, 3)


def test_a_folder_of_weights_without_the_text_encoder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prior.safetensors.gz").symlink_to(folder / "prior.safetensors.gz")
    with pytest.raises(UserError, match=r"text_encoder\.safetensors\.gz is missing from .*pack_prior"):
        create_guidance(GuidanceConfig(name=str(tmp_path)))
