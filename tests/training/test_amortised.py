"""Runs that start from what a network makes of the prompt: the file, what is known, what the scene begins with."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import (
    AMORTISED_FIELD,
    AMORTISED_NETWORK,
    AMORTISED_OBJECTS,
    BallGuidance,
    WordVectors,
    amortised_captions,
    amortised_model,
    small_config,
    write_amortised,
)
from PIL import Image

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.fields import TriplaneFieldConfig
from dreamfusion_fast.guidance.models.embedded.quantize import load_metadata, load_weights, save_weights
from dreamfusion_fast.guidance.models.embedded.text_encoder import TextEncoder
from dreamfusion_fast.rendering import orbit_cameras
from dreamfusion_fast.rendering.orbits import cameras_at
from dreamfusion_fast.scene import Scene
from dreamfusion_fast.training import amortised
from dreamfusion_fast.training.amortised import (
    AMORTISED,
    AmortisedField,
    check_init,
    field_of_prompt,
    load_amortised,
)
from dreamfusion_fast.training.checkpoint import load_checkpoint
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.generator import Generator
from dreamfusion_fast.training.scenes import begin_scene, make_scene
from dreamfusion_fast.training.sections import LogConfig

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(amortised, "TextEncoder", WordVectors)
    return write_amortised(tmp_path / "net.safetensors.gz")


def config_of(file: Path, prompt: str = "a chair", **settings: Any) -> Config:
    return small_config(prompt=prompt, init=str(file), **settings)


def scene_and_nearest(config: Config) -> tuple[Scene, Any]:
    scene = make_scene(config, CPU, torch.Generator().manual_seed(config.seed))
    return scene, begin_scene(scene, config)


def test_a_file_is_what_was_saved_up_to_6_bits(file: Path) -> None:
    model, captions = load_amortised(file)
    saved = amortised_model()
    for name, value in saved.trained_state().items():
        largest = value.flatten(1).abs().amax(dim=1) if value.ndim > 1 else value.abs()
        error = (
            (model.trained_state()[name] - value).flatten(1) if value.ndim > 1 else model.trained_state()[name] - value
        )
        assert bool((error.abs() <= (largest[:, None] if value.ndim > 1 else largest) / 61).all()), name
    assert model.network.config == AMORTISED_NETWORK
    assert model.field.config == AMORTISED_FIELD
    assert (captions.objects, captions.colours, captions.threshold) == (AMORTISED_OBJECTS, ("red", "blue"), 0.72)
    assert load_metadata(file) == load_weights(file)[1]
    assert load_metadata(file)["steps"] == "7"


def test_the_network_and_the_field_have_to_fit() -> None:
    with pytest.raises(ValueError, match="got resolution 8, features 4, scenes 1, want 9, 4, 1"):
        AmortisedField(AMORTISED_NETWORK, dataclasses.replace(AMORTISED_FIELD, resolution=8), 1)


def test_codes_make_different_planes_and_padding_is_not_read() -> None:
    model, (states, pooled) = amortised_model(), WordVectors()(["a chair"])
    with_code = [model.planes(states, pooled, model.codes[i : i + 1]) for i in range(2)]
    without = model.planes(states, pooled)
    assert not torch.allclose(with_code[0], with_code[1])
    assert torch.equal(without, model.planes(states, pooled, torch.full((1, 5), torch.nan)))
    torch.testing.assert_close(without, model.planes(states[:, :2], pooled))


def test_the_nearest_caption_decides_what_is_known() -> None:
    captions = amortised_captions(WordVectors())
    chair = captions.nearest("a red chair", WordVectors())
    assert (chair.phrase, chair.known, chair.objects) == ("chair", True, (0, 1, 2))
    assert chair.similarity == pytest.approx(1, abs=1e-5)
    assert {chair.object(seed) for seed in range(30)} == {0, 1, 2}
    assert chair.object(4) == chair.object(4)
    assert not captions.nearest("a red herring", WordVectors()).known
    # Objects of phrases that are about as near may be meant, too.
    wide = dataclasses.replace(captions, vectors=captions.vectors[1:2].expand(3, -1))
    assert wide.nearest("a chair", WordVectors()).objects == (0, 1, 2, 3)


def test_words_that_people_use_are_told_from_others() -> None:
    encoder = TextEncoder()
    captions = amortised_captions(encoder)
    for prompt in ("a red chair", "an old wooden chair", "a black grand piano"):
        assert captions.nearest(prompt, encoder).known, prompt
    for prompt in ("a robot", "democracy", "asdf"):
        assert not captions.nearest(prompt, encoder).known, prompt


def test_what_is_made_of_a_prompt(file: Path) -> None:
    nearest, field = field_of_prompt(file, "a chair", 3)
    model, _ = load_amortised(file)
    states, pooled = WordVectors()(["a chair"])
    assert nearest.known
    assert torch.equal(field.planes, model.planes(states, pooled, model.codes[nearest.object(3)][None]))
    assert not any(parameter.requires_grad for parameter in field.parameters())


@pytest.mark.parametrize(
    "own", [small_config().field, TriplaneFieldConfig(resolution=24, features=6, hidden=16)], ids=["grid", "planes"]
)
def test_a_scene_of_any_field_begins_as_the_render_that_the_network_makes(file: Path, own: Any) -> None:
    config = config_of(file, seed=3, field=own)
    scene, nearest = scene_and_nearest(config)
    assert nearest.known
    _, source = field_of_prompt(file, "a chair", 3)
    assert all(parameter.requires_grad for parameter in scene.field.parameters())
    wanted = Scene(source, copy.deepcopy(scene.occupancy), scene.background, config.renderer)
    wanted.occupancy.update(source, 0)
    cameras = orbit_cameras(2)
    pictures = [made.render(cameras, 24) for made in (scene, wanted)]
    assert float(pictures[1].std()) > 0.01
    assert -10 * float((pictures[0] - pictures[1]).square().mean().log10()) > 30  # dB
    assert 0 < scene.occupancy.occupied_fraction() < 1
    assert float(scene.occupancy.grid.max()) > 0


def test_another_seed_is_another_object(file: Path) -> None:
    made = [list(scene_and_nearest(config_of(file, init_code=seed))[0].field.parameters()) for seed in (0, 0, 1, 2, 3)]
    same = [[torch.equal(a, b) for a, b in zip(made[0], other, strict=True)] for other in made[1:]]
    assert all(same[0])
    assert not all(map(all, same[1:]))
    by_seed = scene_and_nearest(config_of(file, seed=3, init_code=0))[0].field.parameters()
    assert not all(torch.equal(a, b) for a, b in zip(made[0], by_seed, strict=True))  # of the run's own start


def test_an_unknown_prompt_starts_from_scratch(file: Path, tmp_path: Path, said: Any) -> None:
    config = config_of(file, "a herring", out=str(tmp_path / "run"), steps=1, log=quiet(preview_every=5))
    scene, nearest = scene_and_nearest(config)
    assert not nearest.known
    untouched = make_scene(config, CPU, torch.Generator().manual_seed(0)).field
    assert all(torch.equal(a, b) for a, b in zip(scene.field.parameters(), untouched.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="stop"):
        Generator(config, guidance=Stop()).run()
    (line,) = [line for line in said() if "scratch" in line]
    assert line.startswith(f"starts from scratch: --init {file} does not know the prompt (nearest: ")
    assert not (tmp_path / "run" / "preview.png").exists()


def quiet(**settings: Any) -> LogConfig:
    return LogConfig(**{"checkpoint_every": 0, "tensorboard": False, "progress_bar": False, **settings})


class Stop(BallGuidance):
    """Ends a run in its first step."""

    def gradient(self, request: Any) -> Any:
        raise RuntimeError("stop")


def test_the_picture_comes_before_the_first_step_and_resuming_needs_no_file(
    file: Path, tmp_path: Path, said: Any
) -> None:
    folder = tmp_path / "run"
    config = config_of(file, out=str(folder), steps=3, log=quiet(preview_every=100))
    with pytest.raises(RuntimeError, match="stop"):
        Generator(config, guidance=Stop()).run()
    assert Image.open(folder / "preview.png").size == (4 * 128, 2 * 128)
    lines = said()
    assert f'starts from what --init {file} makes of the prompt (nearest: "chair", similarity 1.00)' in lines
    assert not any("scratch" in line for line in lines)
    assert any(line.startswith(f"{folder / 'preview.png'} shows what the run starts from, after ") for line in lines)
    table = scene_and_nearest(config)[0].field.table
    assert torch.equal(load_checkpoint(folder / "checkpoint.safetensors").tensors["field.table"], table)
    assert Config.load(folder / "config.yaml").init == str(file)
    file.unlink()
    (folder / "preview.png").unlink()
    resumed = Generator.resume(folder, guidance=Stop())
    assert torch.equal(resumed.scene().field.table, table)
    with pytest.raises(RuntimeError, match="stop"):
        resumed.run()
    assert torch.equal(load_checkpoint(folder / "checkpoint.safetensors").tensors["field.table"], table)
    assert not any("starts from" in line for line in said())
    assert not (folder / "preview.png").exists()


def test_what_starts_how() -> None:
    assert Config.for_guidance("embedded").init == AMORTISED
    assert Config.for_guidance("stable-diffusion").init == "scratch"
    assert Config.from_dict({"prompt": "x", "init": "scratch"}).init == "scratch"


def test_the_network_that_ships_knows_chairs_and_their_fronts() -> None:
    check_init(AMORTISED)
    _, captions = load_amortised(AMORTISED)
    assert len(captions.objects) > 1000
    for prompt, known in (("a red chair", True), ("a grand piano", True), ("a robot", False), ("asdf", False)):
        nearest, field = field_of_prompt(AMORTISED, prompt, 0)
        assert (nearest.known, field is not None) == (known, known), prompt
    scene = make_scene(small_config(field=Config().field), CPU, torch.Generator().manual_seed(0))
    _, chair = field_of_prompt(AMORTISED, "a red chair", 0)
    pictures = Scene(chair, scene.occupancy, scene.background, small_config().renderer)
    pictures.occupancy.update(chair, 0)
    sides = cameras_at(torch.tensor([0.5, -0.5]) * math.pi, torch.zeros(2), torch.full((2,), 3.3))
    right, left = pictures.render(sides, 32)
    dark = 1 - right[..., 1:].mean(dim=2), 1 - left[..., 1:].mean(dim=2)  # what is not white
    # The back is at the back: from both sides, most of the upper half is away from the front.
    for picture, back in zip(dark, (slice(16, 32), slice(0, 16)), strict=True):
        assert float(picture[:14, back].sum()) > 2 * float(picture[:14].sum() - picture[:14, back].sum())


def test_damaged_files_are_one_line(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    state, metadata = load_weights(file)
    broken = {
        "nothing.gz": None,
        "empty.gz": b"",
        "cut.gz": content[: len(content) // 2],
        "text.gz": b"no weights",
        "other.gz": gzip.compress(b"\xff" * 64),
        "list.gz": gzip.compress((2).to_bytes(8, "little") + b"[]"),
    }
    for name, data in broken.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    changes = {
        "format": {"format": "another"},
        "field": {"field": '{"resolution": 2}'},
        "config": {"config": '{"heads": 3}'},
        "objects": {"objects": '{"armchair": [0], "chair": [7], "grand piano": [3]}'},
        "fewer": {"objects": '{"armchair": [0]}'},
        "threshold": {"threshold": "high"},
    }
    for name, change in changes.items():
        save_weights(tmp_path / f"{name}.gz", state, {**metadata, **change})
    save_weights(tmp_path / "weights.gz", {k: v for k, v in state.items() if "unfold" not in k}, metadata)
    for name in (*broken, *(f"{name}.gz" for name in changes), "weights.gz"):
        with pytest.raises(UserError, match=f"--init {tmp_path / name}: cannot be read") as caught:
            load_amortised(tmp_path / name)
        assert "\n" not in str(caught.value)
    for name in (*broken, "format.gz", "field.gz"):
        if name == "cut.gz":  # behind the header, which is all that is read here
            continue
        with pytest.raises(UserError, match="cannot be read"):
            check_init(str(tmp_path / name))
