"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Convention = Literal["null", "text"]


def guided(null: Tensor, text: Tensor, scale: float, convention: Convention = "null") -> Tensor:
    """Predictions `[B, ...]` without and with the text in one.

    Args:
        null, text: of any prediction type.
        scale: s.
        convention: "null" null + s (text - null); "text" text + s (text - null).
    """
    return (null if convention == "null" else text) + scale * (text - null)
