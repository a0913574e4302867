"""Doctor: says what is there, survives what is broken, and its exit code means what it says."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

from dreamfusion_fast import cli, doctor
from dreamfusion_fast.ops import _native


def by_name(checks):
    return {check.name: check for check in checks}


@pytest.fixture
def complete(monkeypatch):
    """A machine on which nothing needed is missing, whatever this one is."""
    monkeypatch.setattr(doctor, "_prior", lambda: [doctor.Check("embedded prior", "ok", "")])
    monkeypatch.setattr(_native, "cpu_reason", lambda: "")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2", 'pytest>=8; extra == "test"'])


def test_names_versions_and_machine(complete):
    checks = by_name(doctor.examine())
    assert torch.__version__ in checks["torch"].text
    assert importlib.metadata.version("torch") in checks["packages"].text
    assert "pytest" not in checks["packages"].text
    assert "GiB free" in checks["memory"].text
    assert "GiB free" in checks["disk, this folder"].text
    assert checks["CPU core"].status == "ok"
    assert "CUDA core" in checks
    assert "triton" in checks


@pytest.mark.gpu
def test_names_the_gpu():
    check = by_name(doctor.examine())["GPU 0"]
    assert torch.cuda.get_device_name(0) in check.text
    assert "compute capability" in check.text
    assert "GiB free" in check.text


def test_exit_code_is_0_when_the_main_job_can_run(complete, capsys):
    assert cli.main(["doctor"]) == 0
    assert "generate can run, on the " in capsys.readouterr().out


def test_missing_package_is_named_with_its_remedy(complete, monkeypatch, capsys):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2", "no-such-package>=1"])
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "not installed: no-such-package\n" in printed
    assert '-> pip install "dreamfusion-fast[generate]"' in printed
    assert "cannot run yet; missing: packages." in printed


def test_a_run_needs_the_packages_of_its_extra(complete, monkeypatch):
    lines = ["torch>=2", 'no-such-mesh>=1; extra == "generate"', "no-such-text; extra == 'generate'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [*lines, 'no-such-test>=1; extra == "test"'])
    (missing,) = [check for check in doctor._packages() if check.fatal]
    assert missing.text == "not installed: no-such-mesh, no-such-text"


def test_missing_cpu_core_is_fatal_unless_the_gpu_takes_over(complete, monkeypatch):
    monkeypatch.setattr(_native, "cpu_reason", lambda: "not built: pip install .")
    monkeypatch.setattr(_native, "cuda_reason", lambda: "no nvcc")
    check = by_name(doctor.examine())["CPU core"]
    assert (check.status, check.text, check.fatal) == ("missing", "not built: pip install .", True)
    monkeypatch.setattr(_native, "cuda_reason", lambda: "")
    assert not by_name(doctor.examine())["CPU core"].fatal


def test_the_weights_are_found_where_the_prior_reads_them():
    from dreamfusion_fast.guidance.models.embedded.text_encoder import WEIGHTS

    assert Path(doctor.__file__).parent / doctor._WEIGHTS == WEIGHTS
    assert doctor._prior()[0].status == "ok"


def test_missing_weights_are_fatal(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    (check,) = doctor._prior()
    assert check.fatal
    assert check.text == "no text encoder and no image model in the package"
    weights = tmp_path / doctor._WEIGHTS
    weights.mkdir(parents=True)
    (weights / "text_encoder.safetensors.gz").write_bytes(b"x")
    assert doctor._prior()[0].text == "no image model in the package"
    (weights / "prior.safetensors.gz").write_bytes(b"x")
    assert doctor._prior()[0].status == "ok"


def test_broken_torch_is_reported_not_raised(complete, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    checks = doctor.examine()
    check = by_name(checks)["torch"]
    assert check.fatal
    assert "does not import" in check.text
    assert "cannot run yet; missing: torch" in doctor.report(checks)


def test_a_check_that_fails_does_not_hide_the_others(complete, monkeypatch):
    def broken():
        raise OSError("broken driver")

    broken.__name__ = "_gpus"
    monkeypatch.setattr(doctor, "_gpus", broken)
    checks = by_name(doctor.examine())
    assert checks["gpus"].text == "OSError: broken driver"
    assert checks["memory"].status in ("ok", "note")


def test_free_memory_is_plausible():
    free = doctor.free_memory()
    assert free is None or 2**20 < free < 2**50
