"""Runs that start from what a network makes of the prompt: the file, what is known, what the scene begins with."""

from __future__ import annotations

import dataclasses
import gzip
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
from dreamfusion_fast.fields.hash_field import HashGridFieldConfig
from dreamfusion_fast.guidance.models.embedded.quantize import load_metadata, load_weights, save_weights
from dreamfusion_fast.guidance.models.embedded.text_encoder import TextEncoder
from dreamfusion_fast.rendering import orbit_cameras
from dreamfusion_fast.scene import Scene
from dreamfusion_fast.training import amortised
from dreamfusion_fast.training.amortised import (
    AmortisedField,
    check_field,
    field_of_file,
    load_amortised,
    planes_of,
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
    return small_config(prompt=prompt, **settings).with_init(str(file))


def scene_and_nearest(config: Config) -> tuple[Scene, Any]:
    scene = make_scene(config, CPU, torch.Generator().manual_seed(config.seed))
    return scene, begin_scene(scene, config)


def test_a_file_is_what_was_saved_up_to_int8(file: Path) -> None:
    model, captions = load_amortised(file)
    saved = amortised_model()
    for name, value in saved.trained_state().items():
        largest = value.flatten(1).abs().amax(dim=1) if value.ndim > 1 else value.abs()
        error = (
            (model.trained_state()[name] - value).flatten(1) if value.ndim > 1 else model.trained_state()[name] - value
        )
        assert bool((error.abs() <= (largest[:, None] if value.ndim > 1 else largest) / 253).all()), name
    assert model.network.config == AMORTISED_NETWORK
    assert model.field.config == AMORTISED_FIELD == field_of_file(file)
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


def test_a_scene_begins_with_the_render_that_the_network_makes(file: Path) -> None:
    scene, nearest = scene_and_nearest(config_of(file, seed=3))
    assert nearest.known
    model, _ = load_amortised(file)
    states, pooled = WordVectors()(["a chair"])
    planes = model.planes(states, pooled, model.codes[nearest.object(3)][None])
    assert torch.equal(planes_of(file, "a chair", 3)[1], planes)
    assert torch.equal(scene.field.planes, planes)
    assert scene.field.planes.requires_grad
    wanted = Scene(model.field.with_planes(planes), scene.occupancy, scene.background, scene.renderer.config)
    cameras = orbit_cameras(2)
    picture = scene.render(cameras, 9)
    assert torch.equal(picture, wanted.render(cameras, 9))
    assert float(picture.std()) > 0.01
    assert 0 < scene.occupancy.occupied_fraction() < 1
    assert float(scene.occupancy.grid.max()) > 0


def test_another_seed_is_another_object(file: Path) -> None:
    made = [scene_and_nearest(config_of(file, init_code=seed))[0].field.planes for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(made[0], made[1])
    assert any(not torch.equal(made[0], other) for other in made[2:])
    assert torch.equal(scene_and_nearest(config_of(file, seed=3))[0].field.planes, made[4])


def test_an_unknown_prompt_starts_from_scratch(file: Path, tmp_path: Path, said: Any) -> None:
    config = config_of(file, "a herring", out=str(tmp_path / "run"), steps=1, log=quiet(preview_every=5))
    scene, nearest = scene_and_nearest(config)
    assert not nearest.known
    assert torch.equal(scene.field.planes, make_scene(config, CPU, torch.Generator().manual_seed(0)).field.planes)
    with pytest.raises(RuntimeError, match="stop"):
        Generator(config, guidance=Stop()).run()
    (line,) = [line for line in said() if "scratch" in line]
    assert line.startswith(f"starts from scratch: {file} does not know the prompt (nearest: ")
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
    assert f'starts from what {file} makes of the prompt (nearest: "chair", similarity 1.00)' in lines
    assert not any("scratch" in line for line in lines)
    assert any(line.startswith(f"{folder / 'preview.png'} shows what the run starts from, after ") for line in lines)
    planes = planes_of(file, "a chair", config.seed)[1]
    assert torch.equal(load_checkpoint(folder / "checkpoint.safetensors").tensors["field.planes"], planes)
    assert Config.load(folder / "config.yaml").init == str(file)
    file.unlink()
    (folder / "preview.png").unlink()
    resumed = Generator.resume(folder, guidance=Stop())
    assert torch.equal(resumed.scene().field.planes, planes)
    with pytest.raises(RuntimeError, match="stop"):
        resumed.run()
    assert torch.equal(load_checkpoint(folder / "checkpoint.safetensors").tensors["field.planes"], planes)
    assert not any("starts from" in line for line in said())
    assert not (folder / "preview.png").exists()


def test_a_file_implies_its_field(file: Path) -> None:
    of_python = Generator("a chair", init=str(file)).config
    of_file = Config.from_dict({"prompt": "a chair", "init": str(file)})
    assert of_python.field == of_file.field == AMORTISED_FIELD
    assert of_file.init == str(file)
    assert Config.from_dict(of_file.to_dict()) == of_file
    assert of_file.with_init("scratch").field == AMORTISED_FIELD
    float32 = Config(prompt="x", field=HashGridFieldConfig(mlp_dtype="float32")).with_init(str(file))
    assert float32.field == dataclasses.replace(AMORTISED_FIELD, mlp_dtype="float32")
    float32.check_start()


def test_a_field_that_does_not_fit_is_one_line(file: Path) -> None:
    with pytest.raises(UserError, match="got --field hash_grid, want triplane") as caught:
        Generator("a chair", init=str(file), field=HashGridFieldConfig())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"it is for another --field \(features: 4, here 8\)"):
        check_field(file, dataclasses.replace(AMORTISED_FIELD, features=8))


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
            field_of_file(tmp_path / name)
