"""The help of every command as Markdown, read from what ``dreamfusion-fast COMMAND --help`` prints."""

from __future__ import annotations

import contextlib
import io
import os
import re
from dataclasses import dataclass, field
from unittest import mock

_WIDTH = "110"  # wider terminals may get groups side by side
_FRAME = "│╭╮╰╯─"


@dataclass
class Group:
    """Options that the help shows in one frame.

    Attributes:
        title: of the frame, such as "optim options".
        about: what stands above the options.
        rows: how an option is called, with its values, and its help.
    """

    title: str
    about: str = ""
    rows: list[tuple[str, str]] = field(default_factory=list)


def help_of(command: str) -> str:
    """The text that ``dreamfusion-fast COMMAND --help`` prints."""
    from dreamfusion_fast import cli

    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # without an encoding tyro's frames are of ASCII
    with mock.patch.dict(os.environ, COLUMNS=_WIDTH), contextlib.redirect_stdout(printed):
        code = cli.main([command, "--help"])
    if code != 0:
        raise RuntimeError(f"dreamfusion-fast {command} --help: exit code {code}")
    printed.seek(0)
    return printed.read()


def all_commands() -> str:
    """Every command with its options. Groups that an earlier command has, too, are named and not repeated."""
    from dreamfusion_fast import cli

    parts: list[str] = []
    seen: dict[tuple[str, ...], str] = {}
    for command in cli.COMMANDS:
        text = help_of(command)
        head, groups = split(text)
        if not groups:  # argparse's own format, which is short
            parts += [f"### {command}", f"```text\n{text.strip()}\n```"]
            continue
        usage, _, description = head.partition("\n\n")
        parts += [f"### {command}", f"```text\n{usage.strip()}\n```", _escaped(description.strip())]
        repeated: dict[str, list[str]] = {}
        for group in groups:
            key = (group.title, group.about, *map(str, group.rows))
            if key in seen:
                repeated.setdefault(seen[key], []).append(group.title.removesuffix(" options"))
                continue
            seen[key] = command
            parts.append(_table(group, command))
        for other, titles in repeated.items():
            parts.append(f"The options of {', '.join(titles)} are those of [{other}](#{other}).")
    return "\n\n".join(parts)


def split(text: str) -> tuple[str, list[Group]]:
    """Split a help text of tyro into the text above the frames and the contents of each frame."""
    head: list[str] = []
    groups: list[Group] = []
    for line in text.splitlines():
        if line.startswith("╭"):
            groups.append(Group(line.strip(_FRAME + " ")))
        elif not groups:
            head.append(line)
        elif line.startswith("│"):
            _read(groups[-1], line[1:-1].rstrip()[1:])
    return "\n".join(head), groups


def _read(group: Group, line: str) -> None:
    """Add a line of a frame to its group."""
    text = line.strip()
    if not text.strip(_FRAME):
        return
    # An option begins at the margin; its help is beside it after two spaces, or in the lines below, further in.
    begins = re.match(r"(-{1,2}[\w.-]+.*?|[A-Z]+)(?:  +(.*))?$", line)
    if begins:
        group.rows.append((begins[1].strip(), begins[2] or ""))
    elif group.rows and line.startswith(" "):
        name, said = group.rows[-1]
        group.rows[-1] = (name, f"{said} {text}".strip())
    else:
        group.about = f"{group.about} {text}".strip()


def _table(group: Group, command: str) -> str:
    rows = [row for row in group.rows if row[0] != "-h, --help"]
    lines = [f"#### {command}: {group.title.removeprefix('positional ')}"]
    if group.about:
        lines += ["", _escaped(group.about)]
    lines += ["", "| option | value | |", "|---|---|---|"]
    for called, said in rows:
        names, values = _names_and_values(called)
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {values} | {_escaped(said)} |")
    return "\n".join(lines)


def _names_and_values(called: str) -> tuple[list[str], str]:
    """`-n INT, --n INT` as its names and its value, in Markdown."""
    names, value = [], ""
    for part in re.split(r", (?=-)", called):
        name, _, value = part.partition(" ")
        names.append(name)
    choices = [_choices(choice) for choice in value.split("|")]
    return names, " or ".join(choices)


def _choices(value: str) -> str:
    """`{a,b}` as words in code style; a kind of value, such as INT, as it is."""
    inside = re.fullmatch(r"\{(.*)\}", value)
    return ", ".join(f"`{word}`" for word in inside[1].split(",")) if inside else _escaped(value)


def _escaped(text: str) -> str:
    """`text` without Sphinx's roles, and with what Markdown would take for markup escaped outside of code."""
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        part.replace("|", "\\|") if index % 2 else re.sub(r"([|<*\[\]_])", r"\\\1", part)
        for index, part in enumerate(parts)
    )
