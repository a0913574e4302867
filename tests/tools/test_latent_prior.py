"""The latent prior's recipe at tiny scale: data made on the spot, a few steps of both trainings, the folder used."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from catalogues import write_catalogue
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

pytest.importorskip("diffusers")

import train_latent_prior
import training_state as state
from latent_prior import autoencoder, diffusion, looks, networks, pipeline, training
from latent_prior.latents import LatentPool, caption_tokens, make_sampler, measure_scale
from prior_data import captions
from prior_data.batches import HELD_OUT_VIEWS, CatalogueSampler
from training_loop import seed_step

from dreamfusion_fast.guidance import GuidanceConfig, GuidanceRequest, ScoreDistillation, Views, create_guidance

WEIGHTS = train_latent_prior.PACKAGE_WEIGHTS
CPU = torch.device("cpu")
EXACT = networks.Precision(CPU, False)
TINY = networks.Shape((8, 8, 16), (8, 16, 16), groups=4)
VIEWS_EACH = 5
WIDTHS = ["--vae-channels", "8", "8", "16", "--unet-channels", "8", "16", "16", "--groups", "4"]
SMALL = [
    "--vae-batch",
    "3",
    "--unet-batch",
    "4",
    "--pool",
    "12",
    "--pool-block",
    "4",
    "--renew-every",
    "2",
    "--no-compile",
]
LOOKS = ["--probe-views", "16", "--sheet-steps", "1"]
BLIND = ["--probe-views", "0", "--sheet-steps", "0"]
LENGTH = ["--vae-steps", "4", "--unet-steps", "5"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMFUSION_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_catalogue(tmp_path_factory.mktemp("data"), VIEWS_EACH)


@pytest.fixture(scope="module")
def sampler(data: Path) -> CatalogueSampler:
    return make_sampler(data, WEIGHTS, CPU)


def train(data: Path, out: Path, *options: str) -> dict[str, Any]:
    """One call of the script; the state it leaves."""
    command = ["train", "--data", str(data), "--out", str(out), *WIDTHS, *SMALL, *LOOKS, *LENGTH, *options]
    train_latent_prior.main(command)
    left = state.load_state(out)
    assert left is not None
    return left


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both trainings in one call, states saved after every second step."""
    out = tmp_path_factory.mktemp("out")
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SHEET_PROMPTS", ("a teapot", "an armchair"))
        train(data, out, "--save-every", "2")
    return out


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of that training."""
    made = tmp_path_factory.mktemp("folder") / "pipeline"
    train_latent_prior.main(["pack", str(trained), "--folder", str(made)])
    return made


def same(a: Any, b: Any) -> bool:
    """Equality of nested states, tensors by every bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.slow
def test_a_call_leaves_few_small_files(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"training.json", "autoencoder.jpg", "samples.jpg"} <= names
    assert len(names) <= 8
    record = json.loads((trained / "training.json").read_text())
    assert (record["done"], record["autoencoder"]["steps"], record["unet"]["steps"]) == (True, 4, 5)
    assert record["scaling_factor"] > 0
    assert set(record["probe"]) == {"right colour", *looks._CAPTIONS.values()}
    assert {line["phase"] for line in record["log"]} == {"autoencoder", "unet"}
    assert set(diffusion.COLUMNS) <= set(record["log"][-1])


# Cut at the end of the autoencoder; in the middle of it and in the middle of the U-Net.
@pytest.mark.slow
@pytest.mark.parametrize("cuts", [[4], [2, 4]])
def test_resumed_equals_uninterrupted(
    data: Path,
    sampler: CatalogueSampler,
    trained: Path,
    tmp_path: Path,
    cuts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "make_sampler", lambda *_: sampler)  # it holds no state, and takes seconds to make
    whole = state.load_state(trained)
    for cut in cuts:
        train(data, tmp_path, "--save-every", "2", "--steps", str(cut), *BLIND)
        assert not json.loads((tmp_path / "training.json").read_text())["done"]
    resumed = train(data, tmp_path, "--save-every", "2", *BLIND)
    assert {name: step for name, (step, _) in resumed["phases"].items()} == {"autoencoder": 4, "unet": 5}
    for part in ("identity", "vae", "unet", "average", "optimizer"):
        assert same(resumed[part], whole[part]), part
    assert resumed["results"]["scaling_factor"] == whole["results"]["scaling_factor"]


@pytest.mark.slow
def test_training_moves_every_weight(trained: Path) -> None:
    seed_step(0, 0, 0)
    networks.make_autoencoder(TINY)  # draws first, as in the training
    fresh, left = networks.make_unet(TINY).state_dict(), state.load_state(trained)
    assert [name for name, value in fresh.items() if torch.equal(value, left["unet"][name])] == []
    moved = [not torch.equal(a, b) for a, b in zip(fresh.values(), left["average"], strict=True)]
    assert all(moved)
    assert not same(list(left["unet"].values()), left["average"])


def test_pool_is_a_function_of_seed_and_step(sampler: CatalogueSampler) -> None:
    def encode(images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 4).repeat(1, 2, 1, 1)[:, :4]

    def pool() -> LatentPool:
        return LatentPool(sampler, encode, seed=1, size=10, block=4, renew_every=2)

    walked, contents = pool(), []
    for step in range(9):
        walked.at(step)
        contents.append(walked.latents.clone())
        jumped = pool()
        jumped.at(step)
        for name in ("latents", "model", "word", "azimuth", "elevation"):
            assert torch.equal(getattr(jumped, name), getattr(walked, name)), (step, name)
    changed = [
        [not torch.equal(contents[step][i : i + 4], contents[step - 2][i : i + 4]) for i in (0, 4, 8)]
        for step in (2, 4, 6, 8)
    ]
    one_after_another = [[True, False, False], [False, True, False], [False, False, True], [True, False, False]]
    assert changed == one_after_another
    latents, tokens = walked.batch(7)
    assert (latents.shape, tokens.shape) == ((7, 4, 16, 16), (7, 20, 384))
    assert all(any(torch.equal(row, other) for other in walked.latents) for row in latents)


def test_training_sees_no_held_out_view(sampler: CatalogueSampler) -> None:
    drawn = {held: sampler.draw(400, held_out=held) for held in (False, True)}
    last = VIEWS_EACH - HELD_OUT_VIEWS
    for held, (model, view) in drawn.items():
        assert torch.equal(view // VIEWS_EACH, model)
        assert set((view % VIEWS_EACH).tolist()) == (set(range(last, VIEWS_EACH)) if held else set(range(last)))


def test_captions_carry_the_view_word_and_are_dropped(sampler: CatalogueSampler) -> None:
    torch.manual_seed(0)
    _, parts = sampler.pictures(*sampler.draw(700))
    assert parts.null.float().mean().item() == pytest.approx(0.1, abs=0.05)
    assert (parts.suffix > 0).float().mean().item() == pytest.approx(0.6, abs=0.08)
    row = int((~parts.null & (parts.suffix > 0)).nonzero()[0])
    words = ["", *captions.COLOURS, captions.TEXTURELESS]
    caption = captions.compose(
        sampler.phrases[parts.phrase[row]], words[parts.word[row]], captions.VIEWS[parts.suffix[row]]
    )
    assert caption.endswith(" view")
    expected = sampler.encoder([caption, ""])[0].bfloat16().float()
    tokens = caption_tokens(sampler, parts)
    torch.testing.assert_close(tokens[row], expected[0], rtol=1e-2, atol=1e-2)
    null = int(parts.null.nonzero()[0])
    torch.testing.assert_close(tokens[null], expected[1], rtol=1e-2, atol=1e-2)


def test_folder_gives_the_prompts_it_was_trained_on(folder: Path, sampler: CatalogueSampler) -> None:
    guidance = create_guidance(GuidanceConfig(name=str(folder)), "cpu")
    hidden = guidance.embed("a red armchair").tensors["hidden"]
    texts = [f"a red armchair, {view} view" for view in ("front", "side", "back", "overhead")]
    torch.testing.assert_close(hidden, sampler.encoder([*texts, ""])[0], rtol=0, atol=1e-5)
    assert guidance.image_size == networks.IMAGE_SIZE


def test_folder_is_a_pipeline_of_diffusers(folder: Path) -> None:
    """diffusers' own pipeline, from words to pixels, draws what this recipe's plain DDIM draws."""
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 16, 16)
    prompts = ["a teapot, side view", "a red armchair"]
    images = theirs(prompts, latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
    ours = pipeline.Pipeline(folder, CPU)
    tokens = ours.encoder(["", *prompts])[0]
    expected = looks.sample(
        ours.vae, ours.unet, ours.scheduler, tokens[:1], tokens[1:], noise, EXACT, scale=3.0, steps=4
    )
    assert images.shape == (2, 3, 64, 64)
    assert images.std() > 1e-3
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_folder_holds_what_was_trained(folder: Path, trained: Path) -> None:
    left, made = state.load_state(trained), pipeline.Pipeline(folder, CPU)
    for name, value in made.vae.state_dict().items():
        assert torch.equal(value, left["vae"][name].float()), name
    for parameter, value in zip(made.unet.parameters(), left["average"], strict=True):
        torch.testing.assert_close(parameter, value.half().float(), rtol=0, atol=0)
    assert made.vae.config.scaling_factor == left["results"]["scaling_factor"]
    assert made.scheduler.config.prediction_type == "v_prediction"
    assert made.unet.config.addition_embed_type is None


@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
def test_sds_gradient_through_the_folder(folder: Path, quick: bool) -> None:
    """`create_guidance` on the folder, against autograd in float64 through diffusers' own autoencoder and U-Net.

    Also with the parts that stand in for diffusers' on a GPU.
    """
    guidance = create_guidance(GuidanceConfig(name=str(folder), dtype="float64", guidance_scale=7.0), "cpu")
    assert isinstance(guidance, ScoreDistillation)
    guidance.model._fuses = quick
    embeddings = guidance.embed("a teapot")
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    looking = Views(torch.tensor([0.0, 3.1]), torch.tensor([0.1, 0.1]))
    out = guidance.gradient(GuidanceRequest(images, embeddings, looking, generator=torch.Generator().manual_seed(4)))

    assert (guidance.model._encoder is not None) == quick
    made = pipeline.Pipeline(folder, CPU)
    vae, unet = made.vae.double(), made.unet.double()
    generator = torch.Generator().manual_seed(4)
    torch.randint(20, 981, (2,), generator=generator)
    noise = torch.randn(2, 4, 16, 16, generator=generator).double()
    x = images.clone().requires_grad_(True)
    latents = vae.encode(2 * x - 1).latent_dist.mode() * vae.config.scaling_factor
    abar = made.scheduler.alphas_cumprod.double()[out.t].view(-1, 1, 1, 1)
    with torch.no_grad():
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        rows = embeddings.tensors["hidden"].double()
        null = unet(noisy, out.t, rows[[4, 4]]).sample
        aimed = unet(noisy, out.t, rows[[0, 2]]).sample
        velocity = null + 7.0 * (aimed - null)
        epsilon = abar.sqrt() * velocity + (1 - abar).sqrt() * noisy
        pull = (1 - abar) * (epsilon - noise)
    (expected,) = torch.autograd.grad((pull * latents).sum(), x)
    assert expected.isfinite().all()
    assert expected.norm() > 1e-3
    assert (aimed - null).abs().max() > 1e-6, "the text must matter for this test to see anything"
    torch.testing.assert_close(out.gradient, expected, rtol=1e-8, atol=1e-10)


def test_scale_makes_latents_of_unit_size(folder: Path, sampler: CatalogueSampler) -> None:
    vae = pipeline.Pipeline(folder, CPU).vae
    factor = measure_scale(sampler, lambda images: autoencoder.encode(vae, images, EXACT), seed=0, count=70, at_once=32)
    latents = autoencoder.encode(vae, sampler.pictures(*sampler.draw(128))[0], EXACT)
    assert (latents * factor).std().item() == pytest.approx(1, abs=0.1)
    # The one in the folder, of the few pictures that this training's pool has.
    few = measure_scale(sampler, lambda images: autoencoder.encode(vae, images, EXACT), seed=0, count=12)
    assert vae.config.scaling_factor == pytest.approx(few, rel=1e-4)


def test_probe_hears_a_network_that_reads_its_caption(folder: Path, sampler: CatalogueSampler) -> None:
    """A network whose error is the distance of the caption it is told from the right one."""
    vae = pipeline.Pipeline(folder, CPU).vae
    abar = networks.make_scheduler().alphas_cumprod
    seed_step(0, looks._STREAM, 0)
    images, parts = sampler.pictures(*sampler.draw(64, held_out=True))
    latents = autoencoder.encode(vae, images, EXACT) * vae.config.scaling_factor
    noise = torch.randn_like(latents)
    right = looks.variants(parts, sampler)["no camera, right suffix"]
    wanted = caption_tokens(sampler, right)

    def listens(x: Tensor, timestep: Tensor, tokens: Tensor, return_dict: bool) -> tuple[Tensor]:
        a = abar[timestep].view(-1, 1, 1, 1)
        off = (tokens - wanted).square().mean((1, 2)).view(-1, 1, 1, 1)
        return (a.sqrt() * noise - (1 - a).sqrt() * latents + off,)

    rows = looks.probe(vae, listens, sampler, abar, EXACT, n=64)
    for t in rows["all right"]:
        assert rows["right view word"][t] < 1e-6
        assert rows["wrong view word"][t] > 1e-4
        assert rows["wrong name"][t] > rows["all right"][t]
        assert rows["wrong colour"][t] > rows["right colour"][t]
        assert rows["no caption"][t] > rows["all right"][t]


@pytest.mark.slow
def test_sample_and_probe_commands(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    picture = tmp_path / "sheet.png"
    prompts = ["--prompt", "a teapot", "an armchair"]
    train_latent_prior.main(["sample", str(folder), "--sheet", str(picture), *prompts, "--steps", "2"])
    with Image.open(picture) as image:
        assert image.size == (6 * 64, 2 * 64)
        assert np.asarray(image).std() > 1
    train_latent_prior.main(["probe", str(folder), "--data", str(data), "--views", "8"])
    assert "probe wrong name" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_input_is_named(
    data: Path, trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = ["pack", str(trained), "--folder"]
    begin = ["train", "--out", str(tmp_path), "--data"]
    wrong = [
        ([*begin, str(tmp_path)], "has no albedo.bin, normal.bin, views.npz, models.json"),
        ([*begin, str(data), "--text-encoder", str(tmp_path)], "has no text_encoder.safetensors.gz, tokenizer.json"),
        ([*begin, str(data), "--minutes", "0"], "minutes must be above 0, got 0.0"),
        ([*begin, str(data), "--unet-batch", "-1"], "unet_batch must be above 0, got -1"),
        ([*begin, str(data), "--vae-channels", "8", "8", "9"], "vae_channels must be three multiples of 8"),
        ([*pack, str(folder)], "is not empty"),
        (
            ["pack", str(data), "--folder", str(tmp_path / "new")],
            f"source: {data} holds no state of a training (state-*.part) and",
        ),
        (["store", str(data), "--weights", str(tmp_path / "new")], f"out: {data} holds no state of a training"),
        (["sample", str(data), "--sheet", str(tmp_path / "a.png")], "holds no pipeline"),
        (["train", "--data", str(data), "--out", str(trained), *WIDTHS, "--seed", "1"], "with seed 0, got 1"),
        (["train", "--data", str(data), "--out", str(trained)], "made with widths"),
    ]
    for arguments, message in wrong:
        with pytest.raises(SystemExit):
            train_latent_prior.main(arguments)
        assert message in " ".join(capsys.readouterr().err.split()), arguments
    train(data, tmp_path / "cut", "--steps", "4", *BLIND)
    with pytest.raises(SystemExit):
        train_latent_prior.main(["pack", str(tmp_path / "cut"), "--folder", str(tmp_path / "new")])
    assert "has not come to the U-Net yet" in capsys.readouterr().err
