"""The renderer needs torch and numpy alone; a run needs the packages of its extra, and says which one is absent."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from dreamfusion_fast.errors import missing_package

# An interpreter that has the standard library, torch with its own requirements, numpy and this package, as after
# `pip install .`: whatever else is installed is not found.
BARE = """
import sys

PACKAGES = {
    *sys.stdlib_module_names, "dreamfusion_fast", "numpy", "torch", "torchgen", "functorch", "filelock",
    "typing_extensions", "sympy", "networkx", "jinja2", "fsspec", "mpmath", "markupsafe", "setuptools", "triton",
}


class Finder:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package in PACKAGES or package.startswith("_sysconfigdata"):  # part of the standard library, unlisted
            return self.finder.find_spec(name, path, target)
        return None


sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
for name in ("scipy", "safetensors", "tyro", "yaml"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")
"""

INSTALL = r' is not installed: pip install "dreamfusion-fast\[generate\]"'

RENDER = """
import importlib, math, pkgutil

import torch

from dreamfusion_fast import HashGridField, HashGridFieldConfig, OccupancyGrid, Rays, VolumeRenderer
from dreamfusion_fast import fields, ops, rendering

try:
    import triton
except ModuleNotFoundError:  # not there, or so old that it needs setuptools without saying so
    triton = None
for package in (ops, fields, rendering):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if triton or not module.name.endswith("_triton"):
            importlib.import_module(module.name)

density = torch.tensor(0.7, requires_grad=True)
origins = torch.tensor([[0.1, -0.2, -3.0], [3.0, 0.5, 0.3], [0.2, 3.0, 0.4]])
rays = Rays(origins, -torch.eye(3)[[2, 0, 1]] * torch.tensor([[-1.0], [1.0], [1.0]]))
renderer = VolumeRenderer(lambda x: (density.expand(len(x)), x.new_full((len(x), 3), 0.25)))
output = renderer.render(rays, background=torch.zeros(3))
opacity = 1 - math.exp(-2 * 0.7)  # both sides of the box are 2 apart
torch.testing.assert_close(output.opacity.flatten(), torch.full((3,), opacity), rtol=0.01, atol=0.0)
torch.testing.assert_close(output.color, output.opacity.reshape(3, 1).expand(3, 3) * 0.25)
output.color.sum().backward()
assert density.grad > 0, density.grad

field = HashGridField(HashGridFieldConfig(levels=3, log2_rows=9, finest_resolution=16))
occupancy = OccupancyGrid(resolution=16)
occupancy.update(field, 0)
image = VolumeRenderer(field, occupancy).render(rendering.orbit_cameras(1).rays(5, 7), shading="lambertian",
    light=torch.tensor([0.0, 2.0, 2.0]), background=torch.ones(3), with_normals=True)
image.color.sum().backward()
assert image.color.isfinite().all()
assert all(parameter.grad.isfinite().all() for parameter in field.parameters() if parameter.grad is not None)
"""


def bare(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in such an interpreter, in a folder without sources: they are not compiled."""
    command = [sys.executable, "-c", BARE + code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_the_renderer_needs_torch_and_numpy_alone(tmp_path: Path) -> None:
    done = bare(RENDER, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_command_line_says_what_to_install(tmp_path: Path) -> None:
    commands = [["generate", "a chair"], ["generate", "--help"], ["export", "out/a"], ["sample", "a chair"]]
    done = bare(f"from dreamfusion_fast.cli import main\nfor words in {commands}: print(main(words))", tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, ["2"] * 4), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert all(re.fullmatch(f"error: [a-z_]+{INSTALL}", line) for line in lines), lines


def test_each_extra_is_named(tmp_path: Path) -> None:
    done = bare("from dreamfusion_fast.cli import main\nprint(main(['app', '--port', '0']))", tmp_path)
    assert done.stdout == "2\n"
    assert done.stderr == 'error: gradio is not installed: pip install "dreamfusion-fast[app]"\n'


def test_a_name_that_needs_the_extra_says_what_to_install(tmp_path: Path) -> None:
    done = bare(
        """
for name in ("Generator", "Guidance", "create_guidance"):
    try:
        exec(f"from dreamfusion_fast import {name}")
    except ImportError as error:
        print(error)
""",
        tmp_path,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all(re.fullmatch(rf"dreamfusion_fast\.\w+: [a-z_]+{INSTALL}", line) for line in lines), lines


def test_help_and_doctor_work_without_the_extra(tmp_path: Path) -> None:
    done = bare("from dreamfusion_fast.cli import main\nprint(main([]), main(['doctor']) in (0, 1))", tmp_path)
    assert done.stdout.startswith("Text to textured 3D mesh")
    assert "generate can" in done.stdout
    assert "ffmpeg" in done.stdout
    assert "Error" not in done.stdout
    assert done.stdout.endswith("0 True\n")
    assert done.stderr == ""


def test_a_missing_module_of_this_package_is_no_missing_package() -> None:
    assert missing_package(ModuleNotFoundError("x", name="dreamfusion_fast.nothing")) is None
    assert missing_package(ModuleNotFoundError("x")) is None
