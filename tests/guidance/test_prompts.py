"""View-dependent prompts."""

from __future__ import annotations

import math

import pytest
import torch

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig
from dreamfusion_fast.guidance.prompts import (
    VIEW_NAMES,
    Prompt,
    PromptSet,
    dropped_words,
    shortened,
    view_index,
    view_shares,
)


def test_texts_follow_the_order_of_the_views() -> None:
    assert [str(prompt) for prompt in PromptSet("a teapot", "blurry").texts] == [
        "a teapot, front view",
        "a teapot, side view",
        "a teapot, back view",
        "a teapot, overhead view",
        "blurry",
    ]


def test_view_dependence_can_be_turned_off() -> None:
    assert PromptSet("a teapot", view_dependent=False).texts == [Prompt("a teapot")] * 4 + [Prompt("")]


def test_white_space_does_not_make_another_prompt() -> None:
    assert PromptSet("  a   teapot \n") == PromptSet("a teapot")


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", None])
def test_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        PromptSet(prompt)


def test_a_view_that_the_user_wrote_is_a_word_like_others() -> None:
    """Only a direction that was added apart is kept when words are left out."""
    own, added = Prompt("a blue teapot, side view"), Prompt("a blue teapot", "side")
    assert str(own) == str(added)
    texts, _ = shortened([own, added], lambda text: len(text) <= 20)
    assert texts == ["a blue teapot, side", "a blue, side view"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("azimuth", "elevation", "name"),
    [
        (0, 0, "front"),
        (45, 0, "front"),
        (-45, 0, "front"),
        (46, 0, "side"),
        (-90, 60, "side"),
        (134, 0, "side"),
        (135, -10, "back"),
        (-135, 0, "back"),
        (180, 0, "back"),
        (-180, 0, "back"),
        (225, 0, "back"),
        (226, 0, "side"),
        (360, 0, "front"),
        (-720 - 30, 0, "front"),
        (0, 61, "overhead"),
        (180, 90, "overhead"),
        (0, -80, "front"),
    ],
)
def test_view_of_a_camera(azimuth: float, elevation: float, name: str, dtype: torch.dtype) -> None:
    index = view_index(
        torch.tensor([math.radians(azimuth)], dtype=dtype), torch.tensor([math.radians(elevation)], dtype=dtype)
    )
    assert VIEW_NAMES[int(index)] == name


def test_batch_and_shapes() -> None:
    azimuth = torch.tensor([0.0, math.pi, math.pi / 2, 0.0], dtype=torch.float64)
    elevation = torch.tensor([0.0, 0.0, 0.0, 1.5], dtype=torch.float64)
    assert view_index(azimuth, elevation).tolist() == [0, 2, 1, 3]
    assert view_index(azimuth[:0], elevation[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"\(4,\) and \(3,\)"):
        view_index(azimuth, elevation[:3])


def test_shares_of_views_lie_between_the_nearest_two() -> None:
    azimuth = torch.deg2rad(torch.tensor([0.0, 45.0, 90.0, -135.0, 180.0, 450.0, 10.0], dtype=torch.float64))
    elevation = torch.tensor([0.0] * 6 + [1.2], dtype=torch.float64)
    expected = [
        [1, 0, 0, 0],
        [0.5, 0.5, 0, 0],
        [0, 1, 0, 0],
        [0, 0.5, 0.5, 0],
        [0, 0, 1, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 1],
    ]
    torch.testing.assert_close(view_shares(azimuth, elevation), torch.tensor(expected, dtype=torch.float64))


def test_words_that_contradict_a_view_are_left_out_of_its_text() -> None:
    dropped = dropped_words("back: smiling, FACE of; overhead:smiling;")
    assert dropped == {"back": ["smiling", "FACE of"], "overhead": ["smiling"]}
    assert [str(text) for text in PromptSet("a smiling, Smiling face of a facet cat", dropped=dropped).texts] == [
        "a smiling, Smiling face of a facet cat, front view",
        "a smiling, Smiling face of a facet cat, side view",
        "a, a facet cat, back view",
        "a, face of a facet cat, overhead view",
        "",
    ]
    guidance = GuidanceConfig(drop_words="back: cat")
    assert guidance.drop_words == "back: cat"


@pytest.mark.parametrize("text", ["behind: face", "back", "back: ,", "face"])
def test_directions_and_words_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"drop_words: got .*, want front, side, back or overhead with words"):
        GuidanceConfig(drop_words=text)


def test_dropping_all_of_a_prompt() -> None:
    with pytest.raises(
        UserError, match="nothing is left of the prompt 'a face' without the words dropped in back views"
    ):
        PromptSet("a face", dropped={"back": ["a", "face"]})
