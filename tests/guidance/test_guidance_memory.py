"""The memory that a guidance states: wrong statements are refused."""

from __future__ import annotations

import pytest

from dreamfusion_fast.guidance.memory import GuidanceMemory


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"weights": -1}, "weights: got -1"),
        ({"unet": 1.5}, "unet: got 1.5"),
        ({"weights": 3, "offloadable": 4}, "offloadable: got 4, want at most the weights, 3"),
    ],
)
def test_wrong_needs_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        GuidanceMemory(**values)
