"""The embedded prior on a network of few, random weights: what it is told, what comes out, what its file holds."""

from __future__ import annotations

import gzip
import math

import pytest
import torch
from fakes import use_prior, write_tiny_prior
from safetensors.torch import load, save

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.contract import GuidanceRequest, Views
from dreamfusion_fast.guidance.creation import create_guidance, create_model
from dreamfusion_fast.guidance.models.embedded.guide import EmbeddedPrior
from dreamfusion_fast.guidance.models.embedded.model import (
    CONDITION_WIDTH,
    SHADINGS,
    UNET_CONFIG,
    PriorNetwork,
    ViewCondition,
    alphas_cumprod,
    load_prior,
    noise_schedule,
    save_prior,
)
from dreamfusion_fast.guidance.models.embedded.quantize import (
    SCALE_SUFFIX,
    dequantize_state_dict,
    load_weights,
    quantize_state_dict,
    save_weights,
)
from dreamfusion_fast.guidance.models.embedded.sample import sample_images
from dreamfusion_fast.guidance.models.embedded.text_encoder import MAX_TOKENS, WIDTH
from dreamfusion_fast.guidance.prompts import Prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module")
def prior(folder):
    return EmbeddedPrior("cpu", "float32", folder)


def inputs(n, seed=0):
    """noisy, t, condition and views of `n` images."""
    g = torch.Generator().manual_seed(seed)
    condition = {
        "tokens": torch.randn(2 * n, MAX_TOKENS, WIDTH, generator=g),
        "pooled": torch.randn(2 * n, WIDTH, generator=g),
    }
    views = Views(torch.rand(n, generator=g) * 6 - 3, torch.rand(n, generator=g), torch.rand(n, 3, generator=g))
    return torch.randn(n, 3, 64, 64, generator=g), torch.randint(0, 1000, (n,), generator=g), condition, views


# Quantisation


@pytest.mark.parametrize("shape", [(64, 64), (113, 37, 3, 3), (1, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("steps", [127, 31, 1])
def test_quantised_weights_are_off_by_half_a_step_of_their_row(shape, dtype, steps):
    weight = (torch.randn(shape) * torch.logspace(-3, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    state = quantize_state_dict({"w": weight}, steps)
    assert state["w"].dtype == torch.int8
    assert bool((state["w"].flatten(1).int().abs().amax(dim=1) == steps).all())
    assert state["w"].shape == shape
    assert state["w" + SCALE_SUFFIX].shape == (shape[0],)
    restored = dequantize_state_dict(state)
    assert restored.keys() == {"w"}
    assert restored["w"].dtype == torch.float32
    largest = weight.float().flatten(1).abs().amax(dim=1)
    error = (restored["w"] - weight.float()).flatten(1).abs().amax(dim=1)
    assert bool((error <= largest / (2 * steps) * (1 + 1e-5)).all())
    assert float((error / largest).max()) > 1e-4  # it is quantised
    # What is quantised already is not changed again.
    again = quantize_state_dict(restored, steps)
    assert torch.equal(again["w"], state["w"])


def test_small_tensors_and_vectors_stay_as_they_are():
    state = {"bias": torch.randn(9000), "small": torch.randn(63, 64), "zero": torch.zeros(64, 64)}
    quantised = quantize_state_dict(state)
    assert quantised.keys() == {"bias", "small", "zero", "zero" + SCALE_SUFFIX}
    restored = dequantize_state_dict(quantised)
    for name, value in state.items():
        assert torch.equal(restored[name], value), name


QUANTISED = "unet.mid_block.resnets.0.conv1.weight.int8_scale"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda scale: {}, f"{QUANTISED} is missing"),
        (lambda scale: {QUANTISED: scale[:1]}, rf"{QUANTISED} must have shape \[64\], got \[1\]"),
        (lambda scale: {QUANTISED: scale * math.nan}, f"{QUANTISED} must be positive and finite"),
        (lambda scale: {QUANTISED: -scale}, f"{QUANTISED} must be positive and finite"),
        (lambda scale: {QUANTISED: scale, "unet.conv_in.bias.int8_scale": scale}, "conv_in.bias.* of no int8 tensor"),
        (lambda scale: {QUANTISED: scale, "unet.more.int8_scale": scale}, "unet.more.* of no int8 tensor"),
    ],
    ids=["missing", "one", "nan", "negative", "of a vector", "of nothing"],
)
def test_wrong_scales_are_refused(tmp_path, broken, message):
    """Unchecked, each of them broadcasts or is passed over, and the file loads without a word."""
    network = PriorNetwork(UNET_CONFIG | {"block_out_channels": (16, 16, 64), "norm_num_groups": 4})
    path = tmp_path / "prior.safetensors.gz"
    save_prior(network.state_dict(), network.config, path, {})
    load_prior(tmp_path)
    metadata, state = load_weights(path)[1], load(gzip.decompress(path.read_bytes()))
    state |= {name: value.clone() for name, value in broken(state.pop(QUANTISED)).items()}
    path.write_bytes(gzip.compress(save(state, metadata)))
    with pytest.raises(
        UserError, match=rf"prior\.safetensors\.gz cannot be read .*{message}.*install the package again"
    ):
        load_prior(tmp_path)


# What the network is told of a view


def test_view_condition_says_camera_background_and_shading():
    azimuth, elevation = torch.tensor([0.0, math.pi / 2, -1.0]), torch.tensor([0.0, 0.3, -0.2])
    background = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.0]])
    vector = ViewCondition(azimuth, elevation, background, torch.tensor([0, 1, 2])).vector(3, "cpu")
    assert vector.shape == (3, 15)
    vector = vector / vector[0, 0]  # all flags and values have one scale
    a, e = azimuth, elevation
    camera = [torch.ones(3), a.sin(), a.cos(), (2 * a).sin(), (2 * a).cos(), e.sin(), e.cos()]
    torch.testing.assert_close(vector[:, :7], torch.stack(camera, dim=1))
    torch.testing.assert_close(vector[:, 7], torch.ones(3))
    torch.testing.assert_close(vector[:, 8:11], 2 * background - 1)
    torch.testing.assert_close(vector[:, 11], torch.ones(3))
    torch.testing.assert_close(vector[:, 12:], torch.eye(3))


def test_what_is_unknown_is_zero():
    assert not ViewCondition().vector(4, "cpu").any()
    ones, white, kind = torch.ones(2), torch.ones(2, 3), torch.ones(2, dtype=torch.long)
    known = torch.tensor([True, False])
    whole = ViewCondition(ones, ones, white, kind).vector(2, "cpu")
    for columns, condition in (
        (slice(0, 7), ViewCondition(ones, ones, white, kind, camera_known=known)),
        (slice(7, 11), ViewCondition(ones, ones, white, kind, background_known=known)),
        (slice(11, 15), ViewCondition(ones, ones, white, kind, shading_known=known)),
    ):
        vector = condition.vector(2, "cpu")
        assert torch.equal(vector[0], whole[0])
        assert not vector[1, columns].any()
        assert int((vector[1] != whole[1]).sum()) == int((whole[1, columns] != 0).sum())


# Network and file


def test_network_is_saved_and_loaded_up_to_quantisation(folder, tmp_path):
    network = load_prior(folder)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    g = torch.Generator().manual_seed(0)
    arguments = (
        torch.randn(3, 3, 64, 64, generator=g),
        torch.tensor([0, 500, 999]),
        torch.randn(3, MAX_TOKENS, WIDTH, generator=g),
        torch.randn(3, CONDITION_WIDTH, generator=g),
    )
    out = network(*arguments)
    assert out.shape == (3, 3, 64, 64)
    save_prior(network.state_dict(), network.config, tmp_path / "prior.safetensors.gz", {"trained": "no"})
    again = load_prior(tmp_path)
    torch.testing.assert_close(again(*arguments), out)
    path = tmp_path / "prior.safetensors.gz"
    assert load_weights(path)[1]["trained"] == "no"
    stored = load(gzip.decompress(path.read_bytes()))
    for name, parameter in network.named_parameters():
        large = parameter.ndim > 1 and parameter.numel() >= 4096
        assert stored[name].dtype == (torch.int8 if large else torch.float32)


@pytest.mark.parametrize("index", [1, 2, 3])
def test_network_hears_time_caption_and_condition(folder, index):
    network = load_prior(folder)
    x, t, tokens, condition = (
        torch.randn(1, 3, 64, 64),
        torch.tensor([500]),
        *(torch.randn(1, *s) for s in ((20, 384), (399,))),
    )
    arguments = [x, t, tokens, condition]
    before = network(*arguments)
    arguments[index] = torch.tensor([100]) if index == 1 else torch.randn_like(arguments[index])
    assert float((network(*arguments) - before).abs().max()) > 1e-4 * float(before.abs().max())


def test_noise_schedule_is_the_cosine():
    alphas = alphas_cumprod()
    assert alphas.shape == (1000,)
    torch.testing.assert_close(alphas, noise_schedule().alphas_cumprod, atol=0, rtol=1e-6)
    t = (torch.arange(1, 999, dtype=torch.float64) + 1) / 1000
    cosine = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(alphas[1:999].double(), cosine, atol=2e-5, rtol=0)


# The prior as a guidance model


def test_predict_gives_both_halves(prior):
    noisy, t, condition, views = inputs(3)
    out = prior.predict(noisy, t, condition, views)
    assert out.shape == (6, 3, 64, 64)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("what", ["azimuth", "elevation", "background", "shading", "no background"])
def test_both_halves_know_the_view(prior, what):
    noisy, t, condition, views = inputs(2)
    background = {"background": 1 - views.background, "no background": None}.get(what, views.background)
    azimuth = views.azimuth + 1.0 if what == "azimuth" else views.azimuth
    elevation = views.elevation + 0.5 if what == "elevation" else views.elevation
    shading = "lambertian" if what == "shading" else views.shading
    out = prior.predict(noisy, t, condition, views)
    changed = prior.predict(noisy, t, condition, Views(azimuth, elevation, background, shading))
    assert not torch.allclose(changed[:2], out[:2])
    assert not torch.allclose(changed[2:], out[2:])


def test_images_of_a_batch_do_not_see_each_other(prior):
    noisy, t, condition, views = inputs(3)
    whole = prior.predict(noisy, t, condition, views)
    one = slice(1, 2)
    alone = prior.predict(
        noisy[one],
        t[one],
        {name: value[[1, 4]] for name, value in condition.items()},
        Views(views.azimuth[one], views.elevation[one], views.background[one]),
    )
    torch.testing.assert_close(alone, whole[[1, 4]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [64, 32, 113])
def test_encode_resizes_and_scales(prior, size):
    images = torch.rand(2, 3, size, size, requires_grad=True)
    encoded = prior.encode(images)
    least, most = encoded.detach().aminmax()
    assert encoded.shape == (2, 3, 64, 64)
    assert encoded.dtype == images.dtype
    assert -1 <= least < most <= 1
    (gradient,) = torch.autograd.grad(encoded.sum(), images)
    # A constant stays one, so each pixel of the model's image passes on its 2 somewhere.
    torch.testing.assert_close(gradient.sum(), torch.tensor(2.0 * encoded.numel()))
    torch.testing.assert_close(prior.encode(torch.full((1, 3, size, size), 0.25)), torch.full((1, 3, 64, 64), -0.5))


@pytest.mark.parametrize("shading", SHADINGS)
def test_guidance_pulls(folder, monkeypatch, shading):
    """The whole way that a trainer goes, by the config's default name."""
    use_prior(folder, monkeypatch)
    guidance = create_guidance(GuidanceConfig(dtype="float32"), "cpu")
    assert guidance.image_size == 64
    embeddings = guidance.embed("a chair")
    assert {name: tuple(value.shape) for name, value in embeddings.tensors.items()} == {
        "tokens": (5, MAX_TOKENS, WIDTH),
        "pooled": (5, WIDTH),
    }
    views = Views(torch.zeros(2), torch.zeros(2), torch.ones(2, 3), shading)
    images = torch.rand(2, 3, 32, 32)

    def pull():
        return guidance.gradient(GuidanceRequest(images, embeddings, views, generator=torch.Generator().manual_seed(1)))

    out = pull()
    assert out.gradient.shape == images.shape
    assert bool(out.gradient.isfinite().all())
    assert float(out.gradient.abs().amax((1, 2, 3)).min()) > 0
    assert torch.equal(pull().gradient, out.gradient)


@pytest.mark.parametrize("missing", ["prior.safetensors.gz", "text_encoder.safetensors.gz", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path, missing):
    folder = write_tiny_prior(tmp_path / "prior")
    (folder / missing).unlink()
    with pytest.raises(
        UserError, match=f"embedded prior's {missing} is missing from .*: tools/pack_prior.py writes it"
    ):
        EmbeddedPrior("cpu", folder=folder)


# Of gzip: a header of ten bytes, the compressed stream, a checksum of four bytes and the size in four.
DAMAGES = {
    "rubbish": lambda whole: b"rubbish",
    "empty": lambda whole: b"",
    "cut off": lambda whole: whole[: len(whole) // 2],
    "bad stream": lambda whole: whole[:10] + b"\xff" * 100 + whole[110:],
    "one bit": lambda whole: whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
    "bad checksum": lambda whole: whole[:-8] + bytes(4) + whole[-4:],
    "not gzip": gzip.decompress,
    "no safetensors": lambda whole: gzip.compress(b"rubbish"),
    "cut before gzip": lambda whole: gzip.compress(gzip.decompress(whole)[:-1]),
    "no metadata": lambda whole: gzip.compress(save(load(gzip.decompress(whole)))),
}


@pytest.mark.quick(5)
@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("name", ["prior.safetensors.gz", "text_encoder.safetensors.gz"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    folder = write_tiny_prior(tmp_path / "prior")
    path = folder / name
    whole = path.read_bytes()
    path.unlink()  # it may be a link to the package's
    path.write_bytes(DAMAGES[damage](whole))
    with pytest.raises(UserError, match=rf"{name} cannot be read \(.+\): install the package again"):
        EmbeddedPrior("cpu", folder=folder).embed_texts([Prompt("a teapot")])


def test_the_same_weights_give_the_same_file(tmp_path):
    state = {"w": torch.randn(64, 64), "b": torch.randn(64)}
    card = {letter: f"\N{GREEK SMALL LETTER ALPHA} {letter}" for letter in "abcdefgh"}
    save_weights(tmp_path / "a.safetensors.gz", state, card)
    save_weights(tmp_path / "b.safetensors.gz", dict(reversed(state.items())), dict(reversed(card.items())))
    content = (tmp_path / "a.safetensors.gz").read_bytes()
    assert content == (tmp_path / "b.safetensors.gz").read_bytes()
    assert content[4:8] == bytes(4)  # no time
    restored, metadata = load_weights(tmp_path / "a.safetensors.gz")
    assert metadata == card
    assert all(torch.equal(restored[n], v) for n, v in dequantize_state_dict(quantize_state_dict(state)).items())
    assert restored.keys() == state.keys()
    save_weights(tmp_path / "a.safetensors.gz", state, {})
    assert load_weights(tmp_path / "a.safetensors.gz")[1] == {}


def test_the_config_gives_the_dtype(folder, monkeypatch):
    use_prior(folder, monkeypatch)
    prior = create_model(GuidanceConfig(dtype="bfloat16"), torch.device("cpu"))
    noisy, t, condition, views = inputs(1)
    assert prior.predict(noisy, t, condition, views).dtype == torch.bfloat16


def test_the_network_in_plain_torch_gives_the_same():
    """Of the real weights, whose widths the CPU core serves."""
    models = [
        create_model(GuidanceConfig(dtype="float32", fused=fused), torch.device("cpu")) for fused in (False, True)
    ]
    assert models[0]._evaluate == models[0]._repeated
    with torch.no_grad():  # with gradients enabled, it is always plain torch
        found, wanted = (model.predict(*inputs(2)) for model in models)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_text_identity_changes_with_the_encoder(folder, prior, tmp_path):
    other = write_tiny_prior(tmp_path / "prior")
    assert EmbeddedPrior("cpu", folder=other).text_identity == prior.text_identity
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(text + " ")
    assert EmbeddedPrior("cpu", folder=other).text_identity != prior.text_identity


def test_texts_have_the_shapes_that_are_said_before(prior):
    embedded = prior.embed_texts([Prompt("a teapot"), Prompt("")])
    assert {name: tuple(value.shape) for name, value in embedded.items()} == {
        name: (2, *shape) for name, shape in prior.text_shapes().items()
    }


# Samples


def test_samples(folder, monkeypatch):
    use_prior(folder, monkeypatch)
    images = sample_images("a chair", n=3, seed=5, steps=2)
    assert images.shape == (3, 64, 64, 3)
    assert images.dtype == "uint8"
    assert (sample_images("a chair", n=3, seed=5, steps=2) == images).all()
    assert (sample_images("a chair", n=3, seed=6, steps=2) != images).any()
    assert (sample_images("a table", n=3, seed=5, steps=2) != images).any()
    assert len({image.tobytes() for image in images}) == 3


def test_a_view_in_the_prompt_replaces_the_cameras(folder, monkeypatch):
    """Then nothing but the noise differs between the pictures."""
    use_prior(folder, monkeypatch)
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.zeros(shape))
    around = sample_images("a chair", n=2, steps=2)
    side = sample_images("a chair, side view", n=2, steps=2)
    assert (around[0] != around[1]).any()
    assert abs(side[0].astype(int) - side[1]).max() <= 1  # batched products may round differently


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"prompt": " "}, "prompt is empty"), ({"n": 0}, "at least 1, got 0 and 40"), ({"steps": 0}, "got 9 and 0")],
)
def test_wrong_arguments_of_sample(arguments, message):
    with pytest.raises(UserError, match=message):
        sample_images(**({"prompt": "a chair"} | arguments))
