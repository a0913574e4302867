"""The prior's data tools: views container, names, captions, colours, OBJ reading."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from prior_data import captions, colours, names, obj, synonyms, views

RNG = np.random.default_rng(0)


def model(noun: str, **changes) -> dict:
    """A model as models.json has it, named after its catalogue name."""
    phrases = captions.phrases_for("none#1", noun)
    base = {"key": "none#1", "noun": next(iter(phrases)), "phrases": phrases, "colours": [], "category": "Kitchen"}
    return base | changes


@pytest.mark.parametrize("count", [1, 8, 9, 10, 72])
def test_sheet_round_trip(count):
    pictures = RNG.integers(0, 256, (count, views.SIZE, views.SIZE, 3), dtype=np.uint8)
    sheet = views.to_sheet(pictures)
    assert sheet.shape[1] == views.COLUMNS * views.SIZE
    np.testing.assert_array_equal(views.from_sheet(sheet, count), pictures)


def test_load_views(tmp_path):
    counts, ends, blobs = [3, 10], {"albedo": [], "normal": []}, {"albedo": b"", "normal": b""}
    for number, count in enumerate(counts):
        for kind, channels in (("albedo", 4), ("normal", 3)):
            picture = np.full((count, views.SIZE, views.SIZE, channels), 60 + 100 * number, np.uint8)
            blobs[kind] += views.encode(views.to_sheet(picture), 90)
            ends[kind].append(len(blobs[kind]))
    for kind, blob in blobs.items():
        (tmp_path / f"{kind}.bin").write_bytes(blob)
    owner = np.repeat([0, 1], counts).astype(np.int32)
    np.savez(tmp_path / "views.npz", counts=counts, albedo_ends=ends["albedo"], normal_ends=ends["normal"], model=owner)
    albedo, normal, meta = views.load_views(tmp_path, workers=1)
    assert (albedo.shape, normal.shape) == ((13, 64, 64, 4), (13, 64, 64, 3))
    np.testing.assert_array_equal(meta["model"], owner)
    for picture in (albedo, normal):
        np.testing.assert_allclose(picture[2:4].mean((1, 2, 3)), [60, 160], atol=3)


def test_names_know_synonyms():
    assert {"couch", "settee"} <= set(model("Sofa")["phrases"])
    assert {"automobile", "vehicle"} <= set(model("VW new beetle")["phrases"])
    assert "tea pot" in model("Teapot")["phrases"]
    assert {"feline"} <= set(model("Cat")["phrases"])
    assert model("VW new beetle")["noun"] == "car"
    assert next(iter(model("Armchair")["phrases"].values())) == 1.0
    assert model("Armchair")["phrases"]["chair"] < model("Armchair")["phrases"]["easy chair"] * 3


def test_phrases_carry_no_colour():
    """A colour word in a phrase would contradict a recoloured picture."""
    for table in (names.NAMES, synonyms.SYNONYMS):
        for line in table.strip().splitlines():
            right = line.partition(": ")[2]
            assert not any(word in right.replace("|", " ").replace(",", " ").split() for word in colours.COLOURS), line


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [("armchair", "an armchair"), ("chair", "a chair"), ("suv", "an suv"), ("sunglasses", "sunglasses"),
     ("pair of sunglasses", "a pair of sunglasses"), ("loaf of bread", "a loaf of bread"), ("bread", "bread"),
     ("vase of tulips", "a vase of tulips"), ("knives in a block", "knives in a block"),
     ("utility shelves", "utility shelves")],
)  # fmt: skip
def test_article(phrase, expected):
    assert captions.article(phrase) == expected


@pytest.mark.parametrize(
    ("azimuth", "elevation", "expected"),
    [(0, 0, "front view"), (44, 10, "front view"), (316, 10, "front view"), (90, 0, "side view"), (270, 0, "side view"),
     (136, 0, "back view"), (180, 59, "back view"), (224, 0, "back view"), (0, 61, "overhead view")],
)  # fmt: skip
def test_view_name(azimuth, elevation, expected):
    assert captions.view_name(math.radians(azimuth), math.radians(elevation)) == expected


def test_captions_are_enumerated():
    models = [model("Armchair", colours=["red", "white"]), model("Teapot"), model("Sunglasses", colours=["black"])]
    known = set(captions.all_captions(models))
    assert {"an armchair", "a red armchair, side view", "a clay teapot, back view"} <= known
    rng = np.random.default_rng(1)
    drawn = set()
    for _ in range(400):
        colour = [None, "blue"][rng.integers(2)]
        entry = models[rng.integers(3)]
        drawn.add(captions.caption_for(entry, "side view", rng, textureless=rng.random() < 0.2, colour=colour))
    assert drawn <= known
    assert any("red and white" in text for text in drawn)
    assert any("clay" in text for text in drawn)


def test_weights_and_split():
    models = [model("Chair", key=f"a#{i}") for i in range(9)] + [model("Teapot", key="b#1"), model("Door", key="c#1")]
    models[-1]["category"] = "Doors and windows"
    captions.split_and_weight(models)
    assert [m["key"] for m in models if m["split"] == "held_out"] == ["a#4"]
    assert models[0]["weight"] == pytest.approx(3 * 8**-0.5, abs=1e-4)
    assert (models[-2]["weight"], models[-1]["weight"]) == (3, 0.5)


@pytest.mark.parametrize(
    ("rgb", "word"),
    [((0.05, 0.05, 0.05), "black"), ((0.95, 0.95, 0.93), "white"), ((0.5, 0.5, 0.5), "grey"), ((0.8, 0.1, 0.1), "red"),
     ((0.95, 0.5, 0.1), "orange"), ((0.95, 0.85, 0.1), "yellow"), ((0.1, 0.5, 0.15), "green"),
     ((0.1, 0.2, 0.8), "blue"), ((0.5, 0.2, 0.7), "purple"), ((0.95, 0.5, 0.7), "pink"), ((0.4, 0.25, 0.12), "brown")],
)  # fmt: skip
def test_colour_words(rgb, word):
    picture = np.broadcast_to(np.array(rgb), (7, 5, 3))
    assert colours.COLOURS[colours.classify(picture)[3, 2]] == word
    assert colours.dominant(picture, np.ones((7, 5))) == [word]


def test_mixed_colours_have_no_name():
    picture = np.eye(3)[np.arange(9) % 3][None] * 0.9
    assert colours.dominant(picture, np.ones((1, 9))) == []


def test_read_obj(tmp_path):
    (tmp_path / "a.mtl").write_text("newmtl red paint\nKd 1 0 0\nd 0.5\n")
    (tmp_path / "a.obj").write_text(
        "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 1\n"
        "usemtl red paint\nf 1/1 2/1 3/2 4/2\nf -4 -3 -2\nf 1 1 2\n"
    )
    (part,) = obj.read_obj(tmp_path / "a.obj")
    assert part.positions.shape == (3, 3, 3)  # the quad's two triangles and one more; the degenerate one is gone
    np.testing.assert_allclose(part.normals, np.broadcast_to([0, 0, 1], (3, 3, 3)))
    np.testing.assert_allclose(part.uvs[0], [[0, 0], [0, 0], [1, 1]])
    np.testing.assert_allclose(part.material.diffuse, [1, 0, 0])
    assert part.material.opacity == 0.5
    (tmp_path / "b.obj").write_text("v 0 0 0\n")
    with pytest.raises(ValueError, match=r"b\.obj"):
        obj.read_obj(tmp_path / "b.obj")
