"""Backgrounds."""

from __future__ import annotations

from threestudio.utils.base import BaseModule


class BaseBackground(BaseModule):
    pass
