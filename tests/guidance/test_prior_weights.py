"""The weights in the package: small enough, trained, and of a network that hears what it is told."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open

from dreamfusion_fast.guidance.prior.sample import sample_images
from dreamfusion_fast.guidance.prior.text_encoder import WEIGHTS


def test_the_file_is_small_and_trained():
    path = WEIGHTS / "prior.safetensors"
    assert path.stat().st_size <= 30e6
    with safe_open(path, framework="pt") as file:
        assert int(file.metadata()["steps"]) > 1000


@pytest.fixture(scope="module")
def pictures():
    """Drawn in few steps: enough to tell an object from its background."""
    return {name: sample_images(f"{name}, front view", n=2, steps=8) for name in ("a red car", "a blue car")}


def test_samples_are_an_object_on_white(pictures):
    for images in pictures.values():
        border = np.concatenate([images[:, :4].reshape(-1, 3), images[:, -4:].reshape(-1, 3)])
        assert border.mean() > 235
        middle = images[:, 24:40, 16:48]
        assert (middle.min(axis=-1) < 200).mean() > 0.5


def test_samples_have_the_colour_that_was_asked_for(pictures):
    def red_minus_blue(images):
        middle = images[:, 24:40, 16:48].astype(float)
        return (middle[..., 0] - middle[..., 2]).mean()

    assert red_minus_blue(pictures["a red car"]) > red_minus_blue(pictures["a blue car"]) + 40
