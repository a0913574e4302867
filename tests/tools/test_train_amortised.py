"""The training of the amortised initialisation at tiny scale: it learns, is cut and resumed, packed and looked at."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogues import NOUNS, write_catalogue
from fakes import WordVectors
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import train_amortised
from amortised import batches, packing, training
from amortised.rendering import ObjectRenderer
from prior_data.batches import HELD_OUT_VIEWS, CatalogueSampler
from training_state import load_state

from dreamfusion_fast.fields import TriplaneField
from dreamfusion_fast.networks.plane_transformer import PlaneTransformer
from dreamfusion_fast.rendering import RendererConfig, VolumeRenderer
from dreamfusion_fast.training.amortised import AmortisedField, load_amortised

CPU = torch.device("cpu")
VIEWS_EACH = 6
SIZES = {"width": 16, "heads": 2, "blocks": 1, "tokens": 3, "patch": 3, "patch-features": 4, "features": 4}
SIZES |= {"code-width": 5, "hidden": 16, "objects": 3, "views": 2, "rays": 33, "samples-across": 24}
RATES = {"rate": 5e-3, "code-rate": 1e-2}
SMALL = [word for name, value in (SIZES | RATES).items() for word in (f"--{name}", str(value))]
CALL = ["--minutes", "9"]


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """One thread, an encoder of no weights, and a training whose learning rate rises at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prior_data.batches.TextEncoder", lambda folder: WordVectors())
        patch.setattr(train_amortised, "TextEncoder", lambda folder: WordVectors())
        patch.setattr("training_loop.WARMUP_STEPS", 5)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_catalogue(tmp_path_factory.mktemp("data"), VIEWS_EACH, held_out=1)


@pytest.fixture(scope="module")
def sampler(data: Path) -> batches.ObjectSampler:
    return batches.ObjectSampler(CatalogueSampler(data, WordVectors(), CPU, suffixes=("",)))


def train(data: Path, state: Path, *options: str) -> dict[str, Any]:
    """One call of the script; the state it leaves."""
    train_amortised.main(["train", "--data", str(data), "--state", str(state), *SMALL, *CALL, *options])
    left = load_state(state)
    assert left is not None
    return left


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training in one call, saved on the way, too."""
    out = tmp_path_factory.mktemp("state")
    with torch.random.fork_rng():
        train(data, out, "--train-steps", "60", "--save-every", "30")
    return out


@pytest.fixture(scope="module")
def packed(data: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "net.safetensors.gz"
    train_amortised.main(["pack", str(trained), "--data", str(data), "--file", str(file)])
    return file


def test_a_batch_is_of_what_is_seen_and_said(sampler: batches.ObjectSampler) -> None:
    batch = sampler.draw(7, 3, 11)
    c, m = sampler.catalogue, 7 * 3 * 11
    assert (len(batch.rays), batch.albedo.shape, batch.opacity.shape) == (m, (m, 3), (m,))
    assert torch.equal(batch.scene, torch.arange(7).repeat_interleave(33))
    assert set(batch.objects.tolist()) <= {0, 1}  # and never the one that is held out
    # Half of the rays, rounded, are at the object; a background is of one view.
    assert bool((batch.opacity.view(21, 11)[:, :6] > 0.5).all())
    assert bool((batch.background.view(21, 11, 3) == batch.background.view(21, 11, 3)[:, :1]).all())
    torch.testing.assert_close(batch.color[batch.opacity == 1], batch.albedo[batch.opacity == 1])
    torch.testing.assert_close(batch.color[batch.opacity == 0], batch.background[batch.opacity == 0])
    # Rays and colours are of the same pixels: those through the ball's middle are opaque, wherever the camera is.
    origins, directions = batch.rays.origins, batch.rays.directions
    closest = (origins - (origins * directions).sum(1, keepdim=True) * directions).norm(dim=1)
    radius = torch.where(batch.objects == 0, 0.3, 0.6).sqrt()[batch.scene] * 3.0 * 0.342
    assert bool((batch.opacity[closest < radius * 0.9] > 0.9).all())
    assert bool((batch.opacity[closest > radius * 1.1] < 0.1).all())
    # All views of an object have one colour, and its word is said.
    of_views = batch.albedo.view(7, 3, 11, 3)[:, :, :6].mean(dim=2)  # WebP's colours differ from pixel to pixel
    assert float((of_views - of_views[:, :1]).abs().max()) < 0.05
    assert sampler.models.tolist() == [0, 1]
    assert c.held_out_models.tolist() == [2]


def test_words_follow_colours(sampler: batches.ObjectSampler) -> None:
    """A third is recoloured, and then the caption says so; held-out views are never drawn."""
    catalogue, model = sampler.catalogue, torch.zeros(4000, dtype=torch.int64)
    grey = torch.full((4000, 3, 1, 1), 0.5)
    albedo, word = catalogue.coloured(model, grey, torch.ones(4000, 1, 1, 1))
    changed = (albedo != grey).flatten(1).any(dim=1)
    assert float(changed.float().mean()) == pytest.approx(0.35, abs=0.03)
    assert bool((word[changed] > 0).all())
    assert set(word[~changed].tolist()) == {0, 4}  # none, or red, its own
    blue = changed & (word == 8)
    assert bool((albedo[blue].flatten(1).argmax(dim=1) == 2).all())


def test_the_renderer_leaves_out_only_what_is_empty(sampler: batches.ObjectSampler) -> None:
    """Within the ball all is sampled: the same as without a grid, for several scenes at once."""
    settings = training.Settings(steps=1)
    model = AmortisedField(settings.network, settings.field, 2, torch.Generator().manual_seed(0)).requires_grad_(False)
    batch = sampler.draw(2, 1, 57)
    planes = torch.randn(2, 3, 7, 7, settings.network.features)
    output = ObjectRenderer(model.field, 40, CPU).render(planes, batch.rays, batch.scene, batch.background)
    plain = VolumeRenderer(model.field.with_planes(planes), None, RendererConfig(samples_across=40))
    wanted = plain.render(batch.rays, batch.background, extras={"scene": batch.scene})
    torch.testing.assert_close(output.color, wanted.color, rtol=1e-5, atol=1e-6)
    assert output.samples < wanted.samples


def test_the_loss_falls_and_the_record_says_so(trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    assert (record["steps"], record["done"]) == (60, True)
    losses = [line["loss"] for line in record["log"]]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.slow
def test_cut_and_resumed_is_the_same_to_the_bit(data: Path, trained: Path, tmp_path: Path) -> None:
    options = ["--train-steps", "60", "--save-every", "30"]
    cut = train(data, tmp_path, *options, "--steps", "30")
    assert cut["phase"][0] == 30
    assert not json.loads((tmp_path / "training.json").read_text())["done"]
    torch.manual_seed(5)  # what ran before does not matter
    again, whole = train(data, tmp_path, *options), load_state(trained)
    assert whole is not None
    for kind in ("parameters", "average"):
        assert again[kind].keys() == whole[kind].keys()
        for name, value in whole[kind].items():
            assert torch.equal(again[kind][name], value), (kind, name)
    assert not torch.equal(cut["average"]["codes"], whole["average"]["codes"])
    assert all(path.stat().st_size <= 15_500_000 for path in trained.iterdir())


def test_a_state_of_the_default_network_fits_eight_files() -> None:
    settings = training.Settings()
    with torch.device("meta"):
        network = PlaneTransformer(settings.network)
    decoder = TriplaneField(settings.field).layers
    count = sum(p.numel() for p in (*network.parameters(), *decoder.parameters()))
    count += 761 * settings.network.code_width
    # Weights, average and two moments, of two bytes each.
    assert 8 * count < 8 * 15_500_000
    assert count < 14.5e6  # and as int8 some 13 MB


def test_a_packed_file_renders_what_was_trained(data: Path, trained: Path, packed: Path) -> None:
    model, captions = load_amortised(packed)
    averaged, record = training.averaged_of(trained)
    assert record["steps"] == 60
    states, pooled = WordVectors()(["an armchair"])

    def planes(of: AmortisedField) -> Tensor:
        return of.planes(states, pooled, of.codes[:1])

    wanted = planes(averaged)
    assert float((planes(model) - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    assert captions.objects["armchair"] == [0]
    assert captions.threshold == packing.THRESHOLD
    assert captions.nearest("a blue teapot", WordVectors()).objects == (1,)
    assert set(captions.objects) == {phrase for phrase in captions.objects if len(captions.objects[phrase]) == 1}


def test_held_out_views_are_nearer_than_a_blank_picture(data: Path, packed: Path, tmp_path: Path) -> None:
    record = tmp_path / "psnr.json"
    train_amortised.main(["evaluate", str(packed), "--data", str(data), "--record", str(record)])
    results = json.loads(record.read_text())
    assert {name: row["objects"] for name, row in results.items()} == {
        "trained, with code": len(NOUNS), "trained, without": len(NOUNS), "held out": 1,
    }  # fmt: skip
    assert results["trained, with code"]["mean"] > 10.5  # white alone: 8.8
    assert HELD_OUT_VIEWS < VIEWS_EACH


@pytest.mark.slow
def test_a_sheet_has_a_row_for_each_prompt(packed: Path, tmp_path: Path) -> None:
    picture = tmp_path / "sheet.png"
    train_amortised.main(["sheet", str(packed), "--picture", str(picture), "--prompt", "a teapot", "a blue armchair"])
    assert Image.open(picture).size == (150 + 8 * 64, (2 + 3) * 64)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--minutes", "0"], "minutes must be above 0, got 0"),
        (["--rays", "0"], "rays must be above 0, got 0"),
        (["--distortion", "-1"], "distortion must be at least 0, got -1"),
        (["--heads", "5"], "want a multiple of heads = 5"),
        (["--train-steps", "61", "--rays", "34"], "state: was made with rays 33, got 34"),
    ],
)
def test_bad_arguments_are_one_line(
    data: Path, trained: Path, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    with pytest.raises(SystemExit):
        train_amortised.main(["train", "--data", str(data), "--state", str(trained), *SMALL, *CALL, *options])
    assert problem in capsys.readouterr().err.splitlines()[-1]


def test_files_that_do_not_go_together_are_one_line(
    data: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, problem in (
        (["pack", str(tmp_path), "--data", str(data), "--file", str(tmp_path / "x")], f"there is none in {tmp_path}"),
        (["evaluate", str(tmp_path / "x"), "--data", str(data)], "cannot be read"),
    ):
        with pytest.raises(SystemExit):
            train_amortised.main(arguments)
        assert problem in capsys.readouterr().err.splitlines()[-1]
