"""What a guidance says of its memory: wrong statements are refused, and what it can do is found."""

from __future__ import annotations

import pytest

from dreamfusion_fast.guidance.memory import (
    BatchPart,
    GuidanceMemory,
    HoldsGraphs,
    Offloads,
    Recomputes,
    StatesMemory,
    takes_part,
)


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


@pytest.mark.parametrize(("first", "batch"), [(-1, 2), (2, 2)])
def test_wrong_parts_are_named(first, batch):
    with pytest.raises(ValueError, match=f"got first {first} of batch {batch}"):
        BatchPart(first, batch)


def test_abilities_are_found_by_their_methods():
    class Able:
        def memory_needs(self, batch, render_size):
            return GuidanceMemory()

        def set_recompute(self, on):
            pass

        def set_offload(self, on):
            pass

        def free_graphs(self):
            pass

    for protocol in (StatesMemory, Recomputes, Offloads, HoldsGraphs):
        assert isinstance(Able(), protocol)
        assert not isinstance(object(), protocol)


def test_a_part_is_taken_where_there_is_a_parameter_for_it():
    assert takes_part(lambda images, part=None: None)
    assert not takes_part(lambda images, generator=None: None)
