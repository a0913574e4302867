"""Files are whole or absent, and a run folder is never written over."""

from __future__ import annotations

import os

import pytest
import safetensors.torch
import torch

from dreamfusion_fast import io
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.io import (
    atomic_path,
    claimed,
    claimed_new,
    default_run_folders,
    open_run_folder,
    read_safetensors,
    safetensors_from_bytes,
    write_bytes,
    write_text,
)


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "one é")
    write_bytes(target, b"two")
    assert target.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_tensors_are_sorted_by_name(tmp_path):
    # safetensors orders them anew in each process. Of 24 names it hits the right order by chance once in 24! times.
    tensors = {f"{i * 7 % 24:02}": torch.full((2,), float(i)) for i in range(24)}
    data = safetensors.torch.save(tensors, {"a": "b"})
    write_bytes(tmp_path / "a.safetensors", data)
    for read, metadata in (safetensors_from_bytes(data), read_safetensors(tmp_path / "a.safetensors")):
        assert list(read) == sorted(tensors)
        assert metadata == {"a": "b"}
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)


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


def test_a_file_is_made_as_open_makes_it(tmp_path, monkeypatch):
    """The umask is the process's: where one thread changes it, all threads have it."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
    write_text(tmp_path / "a.txt", "x")
    (tmp_path / "b.txt").write_text("x")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_claim_makes_nested_folders(tmp_path):
    with claimed_new(tmp_path / "a" / "b", "") as folder:
        assert os.listdir(folder.path) == [io.LOCK]
        assert folder.existing() == []
        folder.mesh.write_bytes(b"")
    assert os.listdir(tmp_path / "a" / "b") == ["mesh.glb"]


def test_claim_leaves_nothing_where_nothing_was_written(tmp_path):
    with claimed(tmp_path / "a"):
        pass
    with pytest.raises(RuntimeError, match="x"), claimed(tmp_path):
        raise RuntimeError("x")
    assert os.listdir(tmp_path) == []


def test_claim_takes_a_folder_of_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with claimed_new(tmp_path, "") as folder:
        assert folder.path == tmp_path
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("name", ["config.yaml", "checkpoint.safetensors", "mesh.glb", "turntable.mp4", "preview.png"])
def test_a_new_run_refuses_a_used_folder(tmp_path, name):
    (tmp_path / name).write_text("x")
    advice = f"continue it with --resume {tmp_path}" if name == "checkpoint.safetensors" else "move it away"
    with pytest.raises(UserError, match=rf"already holds a run \({name}\); {advice}"), claimed_new(tmp_path, ""):
        pass
    assert os.listdir(tmp_path) == [name]


def test_a_claimed_folder_names_its_holder(tmp_path):
    with claimed(tmp_path):
        said = (
            rf"{tmp_path} is in use by process {os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{{4}};"
        )
        for _ in range(2):
            with pytest.raises(UserError, match=said), claimed(tmp_path):
                pass
    with claimed(tmp_path):
        pass


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Between our open of the lock's file and our lock, the holder ends."""
    import fcntl

    first = claimed(tmp_path)
    first.__enter__()
    flock = fcntl.flock

    def late(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        first.__exit__(None, None, None)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(tmp_path), pytest.raises(UserError, match="in use"), claimed(tmp_path):
        pass


def test_where_files_cannot_be_locked_it_is_said(tmp_path, monkeypatch, caplog):
    import fcntl

    def refuse(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path):
        assert "cannot lock" in caplog.text
    assert os.listdir(tmp_path) == []


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / io.LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot write to folder"), claimed(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "x"


def test_only_our_temporary_files_are_removed(tmp_path):
    for file in ("mesh.glb", "checkpoint.safetensors", "grid.png"):
        context = atomic_path(tmp_path / file)
        context.__enter__()
        context.gen.gi_frame.f_locals["temporary"].rename(tmp_path / next(iter(os.listdir(tmp_path))))
    left = set(os.listdir(tmp_path))
    others = {".mesh.tmp.glb", ".mesh.0123456789abcdef.glb", "mesh.0123456789abcdef.tmp.glb", ".config.yaml"}
    for name in others:
        (tmp_path / name).write_text("mine")
    with claimed(tmp_path):
        pass
    assert set(os.listdir(tmp_path)) == others | {name for name in left if name.startswith(".grid.")}


def test_claim_refuses_a_file_and_what_is_below_one(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is a file"), claimed(file):
        pass
    with pytest.raises(UserError, match=r"cannot make output folder .*Not a directory"), claimed(file / "below"):
        pass


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permission bits do not bind this user")
def test_claim_refuses_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot make output folder"), claimed(tmp_path / "run"):
            pass
        with pytest.raises(UserError, match="cannot write to folder"), claimed(tmp_path):
            pass
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_claim_refuses_a_file_system_that_takes_no_files():
    with pytest.raises(UserError, match="cannot write to folder /proc/self"), claimed("/proc/self"):
        pass


def test_open_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        open_run_folder(tmp_path / "absent")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"holds no checkpoint\.safetensors"):
        open_run_folder(tmp_path)
    (tmp_path / "checkpoint.safetensors").write_text("")
    assert open_run_folder(tmp_path).path == tmp_path


def test_default_folders_are_readable_and_the_first_free_one_is_taken(tmp_path, monkeypatch):
    folders = iter(default_run_folders("A  tea-pot, red!", "there"))
    assert [next(folders).as_posix() for _ in range(3)] == [f"there/a-tea-pot-red{end}" for end in ("", "-2", "-3")]
    assert next(iter(default_run_folders("!!!"))).name == "run"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "cup").mkdir(parents=True)
    (tmp_path / "out" / "cup" / "config.yaml").write_text("")
    with claimed_new("", "cup") as second, claimed_new("", "cup") as third:
        assert (second.path.name, third.path.name) == ("cup-2", "cup-3")
    (tmp_path / "out" / "pot").write_text("a file")
    with pytest.raises(UserError, match="out/pot is a file"), claimed_new("", "pot"):
        pass
