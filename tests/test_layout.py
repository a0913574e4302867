"""Rules for every file of the project: short enough to have one job, and free of the machine it was written on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (
    ".ci",
    ".github",
    "backend",
    "benchmarks",
    "cmake",
    "csrc",
    "docs",
    "dreamfusion_fast",
    "examples",
    "tests",
    "tools",
)
SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh", ".sh", ".cmake"}
TEXTS = {*SOURCES, "", ".md", ".txt", ".toml", ".yaml", ".yml", ".json", ".in"}
MAX_LINES = 500
# Home folders and work folders of one machine, and addresses inside one network.
LOCAL = re.compile(
    r"(?<![\w.:/])/(?:work|root|home|Users)/\w"
    r"|\b(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}\b"
)


def files(suffixes: set[str]) -> Iterator[Path]:
    candidates = [
        path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"
    ]  # a worktree's names a folder
    for folder in FOLDERS:
        candidates += (ROOT / folder).rglob("*")
    for path in sorted(candidates):
        if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts:
            yield path


def test_no_source_file_is_longer_than_it_should_be() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(SOURCES)}
    assert len(lengths) > 50
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_LINES} == {}


def test_types_of_custom_ops_are_no_strings() -> None:
    """`torch.library.custom_op` of torch 2.4 refuses the strings that the import makes of types."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "dreamfusion_fast" / "ops").glob("*.py")}
    ops = {name: text for name, text in texts.items() if "@torch.library.custom_op(" in text}
    assert len(ops) > 5
    assert [name for name, text in ops.items() if "from __future__ import annotations" in text] == []


def test_no_file_names_the_machine_it_was_written_on() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in files(TEXTS)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if path != Path(__file__) and LOCAL.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("line", ["cd /ho" + "me/ann/project", "--data=/wo" + "rk/data", "10.0." + "0.7:8080"])
def test_such_a_line_would_be_found(line: str) -> None:
    assert LOCAL.search(line)


@pytest.mark.parametrize("line", ["https://example.org/home/page", "torch==2.13.0", "a/work/b", "version 10.2.1"])
def test_and_these_would_not(line: str) -> None:
    assert not LOCAL.search(line)
