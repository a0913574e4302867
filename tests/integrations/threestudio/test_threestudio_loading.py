"""How the plug-in is found, what it needs, and what its renderer refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import threestudio_cases as cases

# threestudio's launch.py makes a module of each folder in custom/, under the name of the folder.
LAUNCH = """
import importlib.util, pathlib, sys
path = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location(path.name, path / "__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[path.name] = module
spec.loader.exec_module(module)
import threestudio
print(threestudio.find("dreamfusion-fast-volume-renderer").__name__, threestudio.find("dreamfusion-fast-hash-grid"))
"""


def run(code: str, *arguments: str, fake: bool) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path.insert(0, {str(cases.FAKE)!r})\n" if fake else ""
    command = [sys.executable, "-c", path + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_one_line_in_a_folder_of_custom_registers_it(tmp_path: Path) -> None:
    folder = tmp_path / "custom" / "fast-renderer"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import dreamfusion_fast.integrations.threestudio\n")
    result = run(LAUNCH, str(folder), fake=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ThreestudioRenderer ")


def test_without_threestudio_the_error_names_it() -> None:
    result = run("import dreamfusion_fast.integrations.threestudio", fake=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: dreamfusion_fast.integrations.threestudio: cannot import threestudio, want threestudio"
    )


def test_it_loads_neither_the_models_nor_a_gpu() -> None:
    code = (
        "import sys, torch; import dreamfusion_fast.integrations.threestudio\n"
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'diffusers', 'transformers', 'PIL', 'scipy'}), "
        "torch.cuda.is_initialized())"
    )
    result = run(code, fake=True)
    assert result.stdout.strip() == "[] False", result.stderr


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"estimator": "proposal"}, "estimator: got 'proposal', want 'occgrid'"),
        ({"estimator": "importance", "num_samples_per_ray_importance": 128}, "estimator: got 'importance'"),
        ({"return_normal_perturb": True}, "return_normal_perturb: got true without return_samples, want both"),
        ({"num_samples_per_ray": 0}, "num_samples_per_ray: got 0, want at least 1"),
        ({"eval_chunk_size": 0}, "eval_chunk_size: got 0, want at least 1"),
        ({"train_chunk_size": -1}, "train_chunk_size: got -1, want at least 1"),
        ({"radius": 0.0}, "radius: got 0.0, want above 0"),
    ],
)
def test_what_is_not_served_is_refused_by_name(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{cases.RENDERER}: ") as caught:
        cases.make("flat", **cfg)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_geometry_beyond_the_grid_is_refused() -> None:
    geometry = cases.threestudio.find(cases.HASH_GRID)({"radius": 2.0})
    parts = {"material": cases.Flat(), "background": cases.Sky()}
    with pytest.raises(ValueError, match=r"radius: got 1.0, want at least the geometry's, 2.0"):
        cases.threestudio.find(cases.RENDERER)({"radius": 1.0}, geometry=geometry, **parts)
