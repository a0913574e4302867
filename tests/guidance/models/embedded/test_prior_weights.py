"""The weights in the package: small enough, trained, and of a network that hears what it is told."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch
from safetensors.torch import load

from dreamfusion_fast.guidance.models.embedded.model import PriorNetwork
from dreamfusion_fast.guidance.models.embedded.quantize import SCALE_SUFFIX, load_weights
from dreamfusion_fast.guidance.models.embedded.sample import sample_images
from dreamfusion_fast.guidance.models.embedded.text_encoder import WEIGHTS


def test_the_file_is_small_and_trained():
    path = WEIGHTS / "prior.safetensors.gz"
    assert path.stat().st_size < 20e6
    assert int(load_weights(path)[1]["steps"]) > 1000


def test_every_weight_is_stored_as_int8_with_a_scale_per_row():
    """Names and shapes of the network, no more and no less; the 21 M weights take one byte each before gzip."""
    stored = load(gzip.decompress((WEIGHTS / "prior.safetensors.gz").read_bytes()))
    with torch.device("meta"):
        expected = PriorNetwork().state_dict()
    assert {name for name in stored if not name.endswith(SCALE_SUFFIX)} == expected.keys()
    matrices = {name for name, value in expected.items() if value.ndim > 1}
    assert {name for name in stored if name.endswith(SCALE_SUFFIX)} == {name + SCALE_SUFFIX for name in matrices}
    for name, value in expected.items():
        assert stored[name].shape == value.shape, name
        assert stored[name].dtype == (torch.int8 if name in matrices else torch.float32), name
    for name in matrices:
        scale = stored[name + SCALE_SUFFIX]
        assert (scale.dtype, tuple(scale.shape)) == (torch.float32, expected[name].shape[:1]), name
        # The steps are the finest that hold the row: its largest weight is 127 of them.
        assert bool((stored[name].flatten(1).int().abs().amax(dim=1) == 127).all()), name
    assert sum(expected[name].numel() for name in matrices) > 20e6


@pytest.fixture(scope="module")
def pictures():
    """Drawn in few steps: enough to tell an object from its background."""
    return {name: sample_images(f"{name}, front view", n=2, steps=8) for name in ("a red car", "a blue car")}


@pytest.mark.slow
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
