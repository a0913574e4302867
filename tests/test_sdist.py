"""The source distribution holds what its tests need, so that they run where it is unpacked."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parents[1]
# Of no use without the repository.
LEFT_OUT = {".clang-format", ".gitignore", ".pre-commit-config.yaml"}


def tracked() -> list[str]:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    if "pyproject.toml" not in names:
        pytest.skip("needs the repository")
    return names


def test_it_holds_every_tracked_file(tmp_path: Path) -> None:
    names = tracked()
    tree = tmp_path / "tree"
    for name in names:  # a copy, since setuptools leaves files behind, and takes what it finds in older ones
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert {name for name in names if name not in LEFT_OUT and not name.startswith(".github/")} - held == set()
    assert sum(name.startswith("tests/") for name in held) > 100
