"""The measure of quality: what it counts, what it compares with, and one small pass from prompts to the sheet."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_methods
import bench_quality
from fakes import BallGuidance, small_config
from quality import faces, intervals, pictures, report, scoring
from quality.clip import ClipJudge, clip_scores
from quality.judges import verdict
from quality.pictures import Layers, lit
from quality.prompts import PROMPTS, SEEDS, others
from quality.shape import relief, thickness

from dreamfusion_fast.batch.jobs import read_jobs
from dreamfusion_fast.export import TexturedMesh, export_field
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.generator import Generator

BOX = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])


def ball(path: Path, color: tuple[float, float, float], squeezed: float = 1.0) -> TexturedMesh:
    """A ball of radius 0.6, or one that is `squeezed` along z."""

    def field(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inside = (positions / torch.tensor([1.0, 1.0, squeezed])).norm(dim=1) < 0.6
        return 100 * inside.float(), torch.tensor(color).expand(len(positions), 3)

    return export_field(field, BOX, path, resolution=24, texture_size=32, threshold=50.0)


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Layers]:
    """A red and a blue ball and a red disc, eight views of 48 pixels of each."""
    folder = tmp_path_factory.mktemp("balls")
    made = {
        "red": ball(folder / "red.glb", (0.9, 0.1, 0.1)),
        "blue": ball(folder / "blue.glb", (0.1, 0.1, 0.9)),
        "disc": ball(folder / "disc.glb", (0.9, 0.1, 0.1), squeezed=0.15),
    }
    return {name: pictures.of_mesh(mesh.unwrapped, mesh.texture, 8, 48) for name, mesh in made.items()}


def test_prompts_are_forty_and_none_was_tuned_on() -> None:
    assert len({prompt.text for prompt in PROMPTS}) == len(PROMPTS) == 40
    assert len(SEEDS) == 2
    assert sum(prompt.has_front for prompt in PROMPTS) >= 12
    design = (Path(__file__).parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"What follows was chosen later, on (.*?)seed 0", design, re.DOTALL)
    tuned = {text.split(maxsplit=1)[1] for text in re.findall(r'"([^"]*)"', " ".join(said.split()))}
    assert len(tuned) == 11
    tuned |= {re.sub(r"^an? (red |blue )?", "", text) for text in bench_methods.PROMPTS}
    for prompt in PROMPTS:
        assert not tuned & {*prompt.nouns, prompt.text.split(maxsplit=1)[-1]}, prompt


def test_permuted_prompts_share_no_class() -> None:
    bed = next(prompt for prompt in PROMPTS if prompt.text == "a bed")
    assert bed not in others(PROMPTS, bed)
    assert all(not set(other.classes) & set(bed.classes) for other in others(PROMPTS, bed))
    plant, bonsai = (next(p for p in PROMPTS if p.text == text) for text in ("a potted plant", "a bonsai tree"))
    assert bonsai not in others(PROMPTS, plant)


def test_intervals() -> None:
    assert intervals.wilson(1.0, 8) == (pytest.approx(0.6756, abs=1e-4), 1.0)
    assert intervals.wilson(0.5, 40) == (pytest.approx(0.3520, abs=1e-4), pytest.approx(0.6480, abs=1e-4))
    assert intervals.wilson(0.3, 0) == (0.0, 1.0)
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    low, high = intervals.bootstrap(values.tolist())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)
    assert low < values.mean() < high
    assert intervals.bootstrap(values.tolist()) == (low, high)


def test_verdict() -> None:
    said = np.full((8, 1000), 1e-4, np.float32)
    said[:6, 831] = 0.5
    said[:, 10:15] = 0.2
    result = verdict(said, (831, 765))
    assert (result["top5"], result["top1"], result["views"]) == (1.0, 1.0, 0.75)
    assert result["probability"] == pytest.approx((6 * 0.5 + 2e-4 + 8e-4) / 8, rel=1e-5)
    assert verdict(said, (14, 900))["top5"] == 1.0
    assert verdict(said, (14, 900))["top1"] == 0.0
    assert verdict(said, (900,))["top5"] == 0.0


@pytest.mark.slow
def test_without_texture_only_the_shape_is_seen(balls: dict[str, Layers]) -> None:
    red, blue = lit(balls["red"], "colour"), lit(balls["blue"], "colour")
    assert red.shape == (8, 48, 48, 3)
    assert red[0, 24, 24, 0] > red[0, 24, 24, 2] + 0.3
    assert blue[0, 24, 24, 2] > blue[0, 24, 24, 0] + 0.3
    bare = lit(balls["red"], "textureless")
    np.testing.assert_allclose(bare, lit(balls["blue"], "textureless"), atol=1e-6)
    assert np.ptp(bare, axis=-1).max() == 0
    assert bare[0, 12, 24, 0] > bare[0, 34, 24, 0] + 0.05  # the lamp is above
    np.testing.assert_array_equal(bare[0, 0, 0], 1)


def test_flat_things_are_thin_and_without_relief(balls: dict[str, Layers]) -> None:
    assert thickness(balls["red"]) > 0.97
    assert thickness(balls["disc"]) < 0.45
    # A ball seen from afar, from the front: normals are (x, y, sqrt(1 - x^2 - y^2)) in the camera's axes.
    y, x = np.mgrid[1:-1:301j, -1:1:301j]
    inside = (x**2 + y**2 < 1)[None]
    (back,) = pictures.eye_directions(1)
    right, up = np.array([1.0, 0.0, 0.0]), np.cross(back, [1.0, 0.0, 0.0])
    parts = (x, y, np.sqrt(np.clip(1 - x**2 - y**2, 0, 1)))
    normal = sum(part[..., None] * axis for part, axis in zip(parts, (right, up, back), strict=True))
    sphere = Layers(np.ones((1, 301, 301, 3)), normal[None] * inside[..., None], inside.astype(np.float32))
    assert relief(sphere) == pytest.approx(1 / 3, abs=2e-3)
    turned = pictures.turned_to_camera(sphere)[0, 100, 200]
    np.testing.assert_allclose(turned, [part[100, 200] for part in parts], atol=1e-6)
    toward = pictures.eye_directions(4)[:, None, None].astype(np.float32)
    board = Layers(np.ones((4, 6, 6, 3), np.float32), np.tile(toward, (1, 6, 6, 1)), np.ones((4, 6, 6), np.float32))
    assert relief(board) == pytest.approx(0, abs=1e-6)
    nothing = Layers(np.zeros((4, 6, 6, 3), np.float32), np.zeros((4, 6, 6, 3), np.float32), np.zeros((4, 6, 6)))
    assert (thickness(nothing), relief(nothing)) == (0.0, 0.0)


def painted(sides: dict[int, tuple[float, float, float]], size: int) -> Layers:
    """A square whose 24 views have the colour of their class, views between two that of none."""
    count, edge = pictures.FACE_VIEWS, pictures.FACE_SIZE
    alpha = np.zeros((count, edge, edge), np.float32)
    low = (edge - size) // 2
    alpha[:, low : low + size, low : low + size] = 1
    albedo = np.array([sides.get(int(label), (0.5, 0.5, 0.5)) for label in faces.LABEL], np.float32)
    normal = pictures.eye_directions(count).astype(np.float32)[:, None, None] * alpha[..., None]
    return Layers(np.tile(albedo[:, None, None], (1, edge, edge, 1)), normal, alpha)


@pytest.fixture(scope="module")
def finder() -> faces.FrontFinder:
    """A classifier of squares that are light in front, dark at the back and grey at the sides."""
    torch.set_num_threads(1)
    sides = {faces.FRONT: (1.0, 1.0, 0.9), faces.SIDE: (0.4, 0.4, 0.4), faces.BACK: (0.0, 0.0, 0.1)}
    return faces.train({f"model{i}": painted(sides, 30 + i) for i in range(18)}, epochs=12, batch=32, report=False)


@pytest.mark.slow
def test_views_are_classified(finder: faces.FrontFinder, tmp_path: Path) -> None:
    assert finder.trust["accuracy"] > 0.9
    # Of 15 views away from the front, the five of the back look like a second one.
    more = finder.trust["false_fronts_of_two_faced"] - finder.trust["false_fronts"]
    assert more == pytest.approx(finder.trust["fronts_found"] / 3, abs=0.05)
    assert finder.trust["models_trained"] + finder.trust["models_tested"] < 18  # others set the threshold
    finder.save(tmp_path / "faces.npz")
    again = faces.FrontFinder.load(tmp_path / "faces.npz")
    assert (again.threshold, again.trust) == (finder.threshold, finder.trust)
    images = np.random.default_rng(0).uniform(size=(3, 64, 64, 6)).astype(np.float32)
    ours, theirs = (faces.front_probability(each.network, images) for each in (finder, again))
    np.testing.assert_array_equal(ours, theirs)


def test_many_faces_are_counted(finder: faces.FrontFinder) -> None:
    light, grey, dark = (1.0, 1.0, 0.9), (0.4, 0.4, 0.4), (0.0, 0.0, 0.1)
    one = finder.score(painted({faces.FRONT: light, faces.SIDE: grey, faces.BACK: dark}, 36))
    two = finder.score(painted({faces.FRONT: light, faces.SIDE: grey, faces.BACK: light}, 36))
    none = finder.score(painted({faces.FRONT: dark, faces.SIDE: dark, faces.BACK: dark}, 36))
    assert one["many_faces"] < 0.1
    assert one["front"] > 0.9
    assert two["many_faces"] == pytest.approx(one["many_faces"] + 5 / 15, abs=0.01)  # the five views of the back
    assert none == {"many_faces": 0.0, "front": 0.0}


def test_a_front_is_what_differs_from_the_back(balls: dict[str, Layers]) -> None:
    assert faces.difference(balls["red"]) < 0.02
    both = painted({faces.FRONT: (1.0, 1.0, 1.0), faces.BACK: (0.0, 0.0, 0.0)}, 30)
    assert faces.has_front(both)


def test_the_classifier_that_is_shipped_can_be_read() -> None:
    shipped = faces.FrontFinder.load()
    assert 0 < shipped.threshold < 1
    assert shipped.trust["accuracy"] > 1 / 3
    assert faces.WEIGHTS.stat().st_size < 300_000


def test_a_batch_takes_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(bench_quality.subprocess, "run", lambda command: called.append(command) or done)
    rows = [{"prompt": prompt.text, "seed": seed, "name": prompt.name(seed)} for prompt in PROMPTS for seed in SEEDS]
    assert bench_quality.make(tmp_path / "runs", rows, "0.25", ["--steps", "7"]) == 0
    assert called[0][3:] == [
        "batch", str(tmp_path / "runs.yaml"), "--out", str(tmp_path / "runs"), "--gpus-per-run", "0.25", "--steps", "7",
    ]  # fmt: skip
    jobs = read_jobs(tmp_path / "runs.yaml", tmp_path / "runs", lambda preset, guidance: Config())
    assert [(job.name, job.config.seed) for job in jobs[:2]] == [("a-folding-chair-0", 0), ("a-folding-chair-1", 1)]
    assert len(jobs) == 80
    assert {job.config.export.turntable_frames for job in jobs} == {0}


class _Judge:
    """Says mug (504) of what is red, and nothing in particular of the rest."""

    def __init__(self, name: str, device: object = "cpu") -> None:
        self.name = name

    def probabilities(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        said = np.full((len(images), 1000), 1e-3, np.float32)
        red = (images[..., 0] - images[..., 2]).mean((1, 2)) > 0.02
        said[:, :5] = 0.1
        said[red, 504] = 0.4
        return said


def _make(runs: Path, rows: list[dict[str, Any]], gpus_per_run: object, options: object) -> int:
    """A run of a few steps in place of a batch; all but the first row's mesh are balls of other colours."""
    for number, row in enumerate(rows):
        folder = runs / str(row["name"])
        if (folder / "mesh.glb").is_file():
            continue
        if number == 0:
            config = small_config(prompt=row["prompt"], steps=3, out=str(folder))
            Generator(config, guidance=BallGuidance(torch.device("cpu"))).run()
        folder.mkdir(parents=True, exist_ok=True)
        ball(folder / "mesh.glb", (0.9, 0.1, 0.1) if "mug" in str(row["name"]) else (0.1, 0.1, 0.9))
    return 0


@pytest.mark.slow
def test_one_command_measures_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mug = next(prompt for prompt in PROMPTS if prompt.text == "a mug")
    monkeypatch.setattr(bench_quality, "PROMPTS", (PROMPTS[0], mug))
    monkeypatch.setattr(bench_quality, "Judge", _Judge)
    monkeypatch.setattr(bench_quality, "make", _make)
    monkeypatch.setattr(bench_quality.os, "cpu_count", lambda: 1)
    command = ["run", "--out", str(tmp_path), "--seeds", "1", "--size", "32", "--device", "cpu", "--label", "trial"]
    assert bench_quality.main(command) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["runs"], result["missing"]) == (2, [])
    assert [row["lite0 colour"] for row in result["rows"]] == [0.0, 1.0]
    assert [row["lite0 textureless"] for row in result["rows"]] == [0.0, 0.0]
    assert result["objects"]["lite0 colour top5"]["mean"] == 0.5
    assert result["objects"]["many_faces"]["prompts"] == 1  # a mug has no front
    assert result["controls"]["blank white"] == {"lite0": 0.0, "lite2": 0.0}
    assert "untrained field" in result["controls"]
    text = (tmp_path / "result.md").read_text()
    assert "| lite0 colour top5 | 0.500 |" in text
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        page = np.array(sheet.convert("RGB")).astype(int)
    assert page.shape == (2 * 77, 6 * 64 + 8, 3)
    first, second = page[13 + 32, 32], page[77 + 13 + 32, 32]
    assert first[2] > first[0] + 50  # blue
    assert second[0] > second[2] + 50

    asked: list[str] = []
    monkeypatch.setattr(scoring, "score", lambda *_: asked.append("again"))
    monkeypatch.setattr(pictures, "of_file", lambda *_: asked.append("drawn"))
    assert bench_quality.main(command) == 0
    assert asked == []
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["objects"] == result["objects"]
    with pytest.raises(SystemExit, match="--record"):
        bench_quality.main([*command, "--record"])


def test_the_history_has_a_line_per_result(tmp_path: Path) -> None:
    result = {"date": "2026-01-01", "label": "a", "objects": {"many_faces": {"mean": 0.25}}, "runs": 80}
    for label in "ab":
        report.remember(tmp_path / "history.csv", {**result, "label": label})
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["many_faces"], row["runs"]) for row in rows] == [
        ("a", "0.2500", "80"),
        ("b", "0.2500", "80"),
    ]


class _Network(torch.nn.Module):
    """Pictures and words as their colour."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))

    def encode_text(self, colors: torch.Tensor) -> torch.Tensor:
        return colors


def _tokens(texts: list[str]) -> torch.Tensor:
    known = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0)}
    return torch.tensor([known[text.split()[1]] for text in texts])


def test_clip_scores() -> None:
    judge = ClipJudge(_Network(), _tokens, 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    red, blue = np.zeros((2, 4, 20, 20, 3), np.float32)
    red[..., 0] = blue[..., 2] = 1
    right = clip_scores(judge, {"a red ball": red, "a blue ball": blue}, {"white": np.ones_like(red)})
    assert right["similarity"]["mean"] == pytest.approx(1, abs=1e-5)
    assert right["permuted"]["mean"] == pytest.approx(0, abs=1e-5)
    assert right["first"]["mean"] == 1
    assert right["controls"]["white"] == pytest.approx(1 / np.sqrt(3), abs=1e-5)
    wrong = clip_scores(judge, {"a red ball": blue, "a blue ball": red}, {})
    assert (wrong["first"]["mean"], wrong["similarity"]["mean"]) == (0, pytest.approx(0, abs=1e-5))


def test_a_tiny_model_of_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import open_clip
    except (ImportError, RuntimeError):  # the latter of a torchvision that is built for another torch
        pytest.skip("open_clip cannot be imported")
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
    words = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    architecture = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": words}
    (tmp_path / "tiny.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(tmp_path / "tiny.json")
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**architecture).state_dict(), tmp_path / "tiny.pt")
    (tmp_path / "list.txt").write_text("a red ball\n\na blue ball, by the sea\n")
    monkeypatch.setattr(bench_quality, "make", _make)
    monkeypatch.setattr(bench_quality.os, "cpu_count", lambda: 1)
    command = ["clip", str(tmp_path / "list.txt"), "--out", str(tmp_path / "out"), "--device", "cpu", "--size", "32"]
    assert bench_quality.main([*command, "--model", "tiny", "--weights", str(tmp_path / "tiny.pt")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [row["prompt"] for row in result["prompts"]] == ["a red ball", "a blue ball, by the sea"]
    assert -1 < result["similarity"]["mean"] < 1
