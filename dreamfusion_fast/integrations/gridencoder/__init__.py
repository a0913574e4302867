"""The interface of gridencoder, which torch-ngp, stable-dreamfusion and their kin carry, over the ops of this package.

``from dreamfusion_fast.integrations.gridencoder import GridEncoder``, or `install` once, before a project imports its
own: its compiled module ``_gridencoder`` is then this package's, and its Python stays as it is. On a CPU, too.

Copies come in two flavours, which place vertices differently and have the same parameters: ``"stable-dreamfusion"``
(its later versions; positions are clamped half a cell within the box) and ``"torch-ngp"`` (which nerf2mesh and most
others have). A trained table is of use in its own flavour alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamfusion_fast.integrations._names import deferred
from dreamfusion_fast.integrations.gridencoder._install import install

if TYPE_CHECKING:
    from dreamfusion_fast.integrations.gridencoder.grid import GridEncoder, grid_encode
else:
    __getattr__, __dir__ = deferred(__name__, dict.fromkeys(("GridEncoder", "grid_encode"), f"{__name__}.grid"))

__all__ = ["GridEncoder", "grid_encode", "install"]
