"""Wheels: which Pythons they are made for, and that one which lacks a part is refused."""

from __future__ import annotations

import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import build_wheels

CURRENT = f"{sys.version_info[0]}.{sys.version_info[1]}"


def wheel(folder: Path, *names: str) -> Path:
    path = folder / "dreamfusion_fast-1-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


@pytest.fixture
def x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_wheels.platform, "machine", lambda: "x86_64")


def test_an_interpreter_is_what_it_says(tmp_path: Path) -> None:
    headers = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    assert build_wheels.is_python(sys.executable, CURRENT) == headers
    assert not build_wheels.is_python(sys.executable, "3.9")
    assert not build_wheels.is_python(str(tmp_path / "python"), CURRENT)


def test_interpreters_of_the_path_and_of_pyenv_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("bin/python3.12", "pyenv/versions/3.10.1/bin/python3.10", "pyenv/versions/3.13.2/bin/python3.13"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setattr(build_wheels, "is_python", lambda program, version: version != "3.13")
    assert build_wheels.find_pythons(("3.10", "3.12", "3.13", "3.14")) == {
        "3.10": str(tmp_path / "pyenv/versions/3.10.1/bin/python3.10"),
        "3.12": str(tmp_path / "bin/python3.12"),
    }


CORES = ["_core", "_core_avx2", "_core_avx512"]


def modules(names: list[str]) -> list[str]:
    return [f"dreamfusion_fast/{name}.cpython-311-x86_64-linux-gnu.so" for name in names]


def test_whole_wheels_pass(x86: None, tmp_path: Path) -> None:
    build_wheels.check_contents(wheel(tmp_path, *modules(CORES), "dreamfusion_fast-1.dist-info/WHEEL"), cuda=False)
    build_wheels.check_contents(wheel(tmp_path, *modules([*CORES, "_core_cuda"])), cuda=True)


@pytest.mark.parametrize(
    ("names", "cuda", "message"),
    [
        (modules(CORES), True, "not .*_core_cuda"),
        (modules(CORES[:2]), False, "not .*_core_avx512"),
        ([*modules(CORES), "tests/test_a.py"], False, "also holds .'tests'"),
    ],
)
def test_others_are_refused(x86: None, tmp_path: Path, names: list[str], cuda: bool, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        build_wheels.check_contents(wheel(tmp_path, *names), cuda=cuda)
