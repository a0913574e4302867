"""Processes that want the same folder: one gets it, and the others say in one line who has it."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="module")
def servers(serve):
    return serve(), serve()


def both(servers, folders, *arguments):
    """Run the same command at the same time in both folders, which may be one: exit codes and what each printed."""
    for server, folder in zip(servers, folders, strict=True):
        server.begin(folder, *arguments)
    return [server.end() for server in servers]


def one_goes_on(codes, log):
    assert sorted(codes) == [0, 2], log
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in log
    return errors[0]


@pytest.mark.slow
def test_one_folder(servers, config_file, tmp_path):
    codes = both(servers, [tmp_path, tmp_path], "generate", "a cup", "--config", str(config_file), "--out", "run")
    line = one_goes_on(codes, (tmp_path / "log").read_text())
    assert "in use by process" in line or "already holds a run" in line
    assert len(os.listdir(tmp_path / "run")) == 5


@pytest.mark.slow
def test_one_prompt_without_a_folder(servers, config_file, tmp_path):
    """A folder that is in use is no free one."""
    codes = both(servers, [tmp_path, tmp_path], "generate", "a cup", "--config", str(config_file))
    assert codes == [0, 0], (tmp_path / "log").read_text()
    assert sorted(os.listdir(tmp_path / "out")) == ["a-cup", "a-cup-2"]
    first, second = ((tmp_path / "out" / name / "mesh.glb").read_bytes() for name in ("a-cup", "a-cup-2"))
    assert first == second


@pytest.mark.slow
def test_two_resume_one_run(servers, config_file, tmp_path):
    arguments = ("generate", "a cup", "--config", str(config_file), "--out", "run")
    assert servers[0].run(tmp_path, *arguments, kill_at=20) == -9
    codes = both(servers, [tmp_path, tmp_path], "generate", "--resume", "run")
    assert "run is in use by process" in one_goes_on(codes, (tmp_path / "log").read_text())
    assert len(os.listdir(tmp_path / "run")) == 5
