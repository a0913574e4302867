"""Docstrings as the site shows them: in the spelling of griffe's parser, and without Sphinx's roles."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


def plain(text: str) -> str:
    """`text` with Sphinx's roles as code, "Examples:", and a section that begins in the first line indented."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"(?m)^Example:$", "Examples:", text)
    if not text.startswith("Args:\n"):
        return text
    section, gap, rest = text.partition("\n\n")
    lines = section.splitlines()
    return "\n".join([lines[0], *(f"    {line}" for line in lines[1:])]) + gap + rest
