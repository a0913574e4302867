"""Stages: who records is told of them, and nobody pays where nobody records."""

from __future__ import annotations

import contextlib
import timeit

import pytest
import torch

from dreamfusion_fast.gpu.stages import recording, stage


class Notes:
    """Notes when stages begin and end."""

    def __init__(self):
        self.told = []

    @contextlib.contextmanager
    def stage(self, name):
        self.told.append(f"+{name}")
        try:
            yield
        finally:
            self.told.append(f"-{name}")


def test_the_recorder_is_told():
    notes, inner = Notes(), Notes()
    with stage("before"), recording(notes.stage):
        with torch.no_grad(), stage("a"), stage("b"):
            pass
        with recording(inner.stage), stage("c"):
            pass
        with stage("d"):
            pass
    with stage("after"):
        pass
    assert notes.told == ["+a", "+b", "-b", "-a", "+d", "-d"]
    assert inner.told == ["+c", "-c"]


def test_an_error_ends_stages_and_recording():
    notes = Notes()
    with pytest.raises(KeyError, match="x"), recording(notes.stage), stage("a"):
        raise KeyError("x")
    with stage("b"):
        pass
    assert notes.told == ["+a", "-a"]


def test_without_a_recorder_it_is_one_shared_context_and_costs_less_than_a_microsecond():
    assert stage("a") is stage("b")

    def use():
        with stage("a"):
            pass

    assert min(timeit.repeat(use, number=1000, repeat=50)) / 1000 < 1e-6
