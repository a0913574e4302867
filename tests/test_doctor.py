"""Doctor: says what is there, survives what is broken, and its exit code means what it says."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dreamfusion_fast import cli, doctor
from dreamfusion_fast.driver import Driver
from dreamfusion_fast.ops import _native

AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir"


def by_name(checks):
    return {check.name: check for check in checks}


def origin(monkeypatch, text):
    """What pip has noted of where the package came from."""
    monkeypatch.setattr(doctor, "_direct_url", lambda: text)


def with_gpu(monkeypatch, capability=(9, 0), cuda="13.0"):
    """torch with one usable GPU, as far as doctor asks it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    properties = SimpleNamespace(name="a GPU", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**33, 2**34))
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.fixture
def complete(monkeypatch):
    """A machine on which nothing needed is missing, whatever this one is."""
    monkeypatch.setattr(doctor, "_prior", lambda: [doctor.Check("embedded prior", "ok", "")])
    monkeypatch.setattr(_native, "cpu_reason", lambda: "")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2", 'pytest>=8; extra == "test"'])
    monkeypatch.setattr(doctor, "find_driver", lambda: None)
    origin(monkeypatch, None)


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
    assert printed.splitlines()[-2:] == [
        "dreamfusion-fast generate cannot run yet; missing: packages.",
        'Mend it: pip install "dreamfusion-fast[generate]"',
    ]


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


def ending(checks):
    return doctor.report(checks).splitlines()[-2:]


@pytest.mark.parametrize(
    ("found", "torch_cuda", "text", "mend"),
    [
        (Driver(13000, (90,)), None, "built without CUDA", "pip install --force-reinstall torch"),
        (Driver(12080, (90,)), None, "built without CUDA", "pip install --force-reinstall 'torch<2.11'"),
        (Driver(12080, (90,)), "13.0", "its driver is for CUDA 12.8", "pip install --force-reinstall 'torch<2.11'"),
        (Driver(13000, (90,)), "13.0", "torch cannot use it", "nvidia-smi, which says more"),
    ],
)
def test_gpu_that_torch_does_not_use(complete, monkeypatch, found, torch_cuda, text, mend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(doctor, "find_driver", lambda: found)
    checks = doctor.examine()
    assert text in by_name(checks)["GPU"].text
    assert ending(checks) == [
        "dreamfusion-fast generate can run, on the CPU; not as it should be: GPU.",
        f"Mend it: {mend}",
    ]


@pytest.mark.parametrize("found", [None, Driver(13000, ())])
def test_no_gpu_is_nothing_to_mend(complete, monkeypatch, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "find_driver", lambda: found)
    assert doctor.report(doctor.examine()).endswith("\ndreamfusion-fast generate can run, on the CPU.")


@pytest.mark.parametrize(
    ("toolkit", "driver", "mend"),
    [
        (None, 13000, f"{AGAIN} /opt/sources"),
        (
            None,
            12080,
            f"apt install nvidia-cuda-toolkit && {AGAIN} /opt/sources",
        ),
        ("/usr/bin/nvcc", 12080, f"{AGAIN} /opt/sources"),
    ],
)
def test_missing_cuda_core_is_built_by_one_command(complete, monkeypatch, toolkit, driver, mend):
    with_gpu(monkeypatch)
    origin(monkeypatch, '{"url": "file:///opt/sources", "dir_info": {}}')
    monkeypatch.setattr(_native, "cuda_reason", lambda: "there was no GPU when it was built")
    monkeypatch.setattr(doctor, "find_driver", lambda: Driver(driver, (90,)))
    monkeypatch.setattr(doctor, "_toolkit", lambda: toolkit)
    assert ending(doctor.examine()) == [
        "dreamfusion-fast generate can run, on the CPU; not as it should be: CUDA core.",
        f"Mend it: {mend}",
    ]


def test_cuda_core_for_other_gpus_is_built_anew(complete, monkeypatch):
    with_gpu(monkeypatch, (8, 6))
    monkeypatch.setattr(_native, "cuda_reason", lambda: "")
    monkeypatch.setattr(_native, "cuda_architectures", lambda: "80-real 90")
    monkeypatch.setattr(doctor, "find_driver", lambda: Driver(13000, (86,)))
    assert by_name(doctor.examine())["CUDA core"].status == "ok"
    monkeypatch.setattr(_native, "cuda_architectures", lambda: "75-real 90")
    check = by_name(doctor.examine())["CUDA core"]
    assert check.status == "missing"
    assert check.text == "built for 75-real 90, which GPUs of compute capability 8.6 do not run"


@pytest.mark.parametrize(
    ("built", "gpu", "served"),
    [
        ("90", 90, True),
        ("80-real", 86, True),
        ("86-real", 80, False),
        ("80", 120, True),
        ("80-real", 90, False),
        ("90a", 100, False),
        ("75-real 120", 90, False),
        ("75-real 120", 121, True),
    ],
)
def test_which_gpus_run_what_was_compiled(built, gpu, served):
    assert doctor._serves(built, gpu) == served


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ('{"url": "file:///opt/my%20sources", "dir_info": {"editable": true}}', "-e '/opt/my sources'"),
        ('{"url": "file:///opt/x.whl", "archive_info": {}}', "--no-binary dreamfusion-fast dreamfusion-fast"),
        (None, "--no-binary dreamfusion-fast dreamfusion-fast"),
    ],
)
def test_what_pip_installs_again(monkeypatch, text, command):
    origin(monkeypatch, text)
    assert doctor._rebuild() == f"{AGAIN} {command}"
