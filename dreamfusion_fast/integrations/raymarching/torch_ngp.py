"""The functions of raymarching as torch-ngp calls them: other arguments and results than those of its forks.

Of each sample there is `deltas` = (dt, distance to the end of the sample before), and depths count from where a ray's
first step begins. All else is as in `dreamfusion_fast.integrations.raymarching`.
"""

from __future__ import annotations

from dreamfusion_fast.integrations._names import deferred
from dreamfusion_fast.integrations.raymarching import OWN, SHARED
from dreamfusion_fast.integrations.raymarching._install import install

_PACKAGE = __name__.rpartition(".")[0]
_MODULES = dict.fromkeys(OWN, f"{_PACKAGE}._torch_ngp") | dict.fromkeys(SHARED, f"{_PACKAGE}._grid")
__all__ = ["install", *_MODULES]

__getattr__, __dir__ = deferred(__name__, _MODULES)
