"""Answering to the name of nerfacc: what resolves to the drop-in, what is left out, and what the import costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.integrations import nerfacc

INSTALL = "from dreamfusion_fast.integrations.nerfacc import install\n"


def run(code: str, folder: Path) -> str:
    """What a fresh interpreter prints, which finds modules in `folder` too."""
    code = f"import sys\nsys.path.insert(0, {str(folder)!r})\n" + code
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_resolve_to_it(tmp_path: Path) -> None:
    code = (
        INSTALL
        + """
print(install(), install())
import nerfacc
import nerfacc.grid
from nerfacc import OccGridEstimator, accumulate_along_rays
from nerfacc.data_specs import RayIntervals
from nerfacc.estimators.base import AbstractEstimator
from nerfacc.estimators.occ_grid import OccGridEstimator as Same
from nerfacc.estimators.prop_net import PropNetEstimator, _lossfun_outer, _pdf_loss, get_proposal_requires_grad_fn
from nerfacc.grid import _enlarge_aabb, _query, _ray_aabb_intersect
from nerfacc.losses import distortion
from nerfacc.pack import pack_info
from nerfacc.pdf import _sample_from_weighted
from nerfacc.scan import exclusive_prod
from nerfacc.version import __version__
from nerfacc.volrend import accumulate_along_rays_, rendering
import dreamfusion_fast.integrations.nerfacc as ours
print(nerfacc is ours, OccGridEstimator is Same, nerfacc.grid is ours.grid, nerfacc.__version__ == __version__)
"""
    )
    assert run(code, tmp_path).split() == ["True"] * 6


def test_it_gives_way_to_nerfacc_unless_told(tmp_path: Path) -> None:
    (tmp_path / "nerfacc").mkdir()
    (tmp_path / "nerfacc" / "__init__.py").write_text("theirs = True\n")
    (tmp_path / "nerfacc" / "cuda.py").write_text("")
    code = (
        INSTALL
        + """
print(install())
import nerfacc, nerfacc.cuda
print(nerfacc.theirs, install(), install(force=True))
import nerfacc
print(nerfacc.__name__, "nerfacc.cuda" in sys.modules, install())
"""
    )
    assert run(code, tmp_path).split() == [
        "False", "True", "False", "True", "dreamfusion_fast.integrations.nerfacc", "False", "True",
    ]  # fmt: skip


def test_the_import_is_quick_and_needs_no_core(tmp_path: Path) -> None:
    code = """
import time
import torch
times = []
for _ in range(3):
    for name in [name for name in sys.modules if name.startswith("dreamfusion_fast")]:
        del sys.modules[name]
    start = time.process_time()
    import dreamfusion_fast.integrations.nerfacc
    times.append(time.process_time() - start)
print(min(times), "dreamfusion_fast.ops" in sys.modules)
"""
    seconds, ops = run(code, tmp_path).split()
    assert float(seconds) < 0.1  # half of that on an idle core
    assert ops == "False"


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("import nerfacc.cameras", "nerfacc.cameras is not served by dreamfusion_fast: lens undistortion"),
        ("from nerfacc import cameras", "nerfacc.cameras is not served by dreamfusion_fast: lens undistortion"),
        ("from nerfacc.cameras import opencv_lens_undistortion", "nerfacc.cameras is not served"),
        ("from nerfacc.estimators.vdb import VDBEstimator", "nerfacc.estimators.vdb is not served"),
    ],
)
def test_modules_that_are_left_out_say_so(statement: str, message: str, tmp_path: Path) -> None:
    code = f"{INSTALL}install()\ntry:\n    {statement}\nexcept ImportError as error:\n    print(error)\n"
    assert run(code, tmp_path).startswith(message)


@pytest.mark.parametrize(
    "name", ["cameras", "cuda", "ContractionType", "OccupancyGrid", "ray_marching", "VDBEstimator"]
)
def test_names_that_are_left_out_say_so(name: str) -> None:
    assert not hasattr(nerfacc, name)
    with pytest.raises(AttributeError, match=f"nerfacc.{name} is not served by dreamfusion_fast: "):
        getattr(nerfacc, name)


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="nerfacc has no 'nothing'"):
        nerfacc.nothing  # noqa: B018


def test_estimators_of_others_derive_from_the_base() -> None:
    from dreamfusion_fast.integrations.nerfacc.estimators.base import AbstractEstimator

    class Own(AbstractEstimator):
        def sampling(self, n: int) -> Tensor:
            return torch.zeros(n, device=self.device)

    assert Own().sampling(3).shape == (3,)
    assert Own().state_dict() == {}
    assert isinstance(nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], 2), AbstractEstimator)
    with pytest.raises(NotImplementedError, match="Own defines no update_every_n_steps"):
        Own().update_every_n_steps()
    with pytest.raises(NotImplementedError, match="AbstractEstimator defines no sampling"):
        AbstractEstimator().sampling()
