"""Files are whole or absent, and a run folder is never written over."""

from __future__ import annotations

import os

import pytest

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.io import (
    atomic_path,
    default_run_folder,
    open_run_folder,
    prepare_run_folder,
    write_bytes,
    write_text,
)


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "one é")
    write_bytes(target, b"two")
    assert target.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_written_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_write_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "a.glb"
    target.write_text("old")

    def write():
        with atomic_path(target) as temporary:
            assert temporary.suffix == ".glb"
            assert temporary.parent == tmp_path
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.glb"]


def test_prepare_makes_nested_folders(tmp_path):
    folder = prepare_run_folder(tmp_path / "a" / "b")
    assert folder.path.is_dir()
    assert folder.existing() == []


def test_prepare_accepts_a_folder_of_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert prepare_run_folder(tmp_path).path == tmp_path


@pytest.mark.parametrize("name", ["config.yaml", "checkpoint.safetensors", "mesh.glb", "turntable.mp4", "preview.png"])
def test_prepare_refuses_a_used_folder(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=rf"already holds a run \({name}\).*--resume {tmp_path}"):
        prepare_run_folder(tmp_path)


def test_prepare_refuses_a_file_and_what_is_below_one(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is a file"):
        prepare_run_folder(file)
    with pytest.raises(UserError, match=r"cannot make output folder .*Not a directory"):
        prepare_run_folder(file / "below")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permission bits do not bind this user")
def test_prepare_refuses_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot make output folder"):
            prepare_run_folder(tmp_path / "run")
        with pytest.raises(UserError, match="cannot write to folder"):
            prepare_run_folder(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_prepare_refuses_a_file_system_that_takes_no_files():
    with pytest.raises(UserError, match="cannot write to folder /proc/self"):
        prepare_run_folder("/proc/self")


def test_open_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        open_run_folder(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        open_run_folder(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"holds no checkpoint\.safetensors"):
        open_run_folder(tmp_path)
    (tmp_path / "checkpoint.safetensors").write_text("")
    assert open_run_folder(tmp_path).path == tmp_path


def test_default_folder_is_free_and_readable(tmp_path):
    first = default_run_folder("A  tea-pot, red!", tmp_path)
    assert first == tmp_path / "a-tea-pot-red"
    first.mkdir()
    (first / "config.yaml").write_text("")
    assert default_run_folder("a tea pot red", tmp_path) == tmp_path / "a-tea-pot-red-2"
    assert default_run_folder("!!!", tmp_path).name == "run"
