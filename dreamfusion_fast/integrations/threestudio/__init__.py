"""A volume renderer and a geometry for threestudio, registered when this module is imported.

`custom/fast-renderer/__init__.py` beside threestudio's `launch.py` has one line::

    import dreamfusion_fast.integrations.threestudio

and a config says ``renderer_type: dreamfusion-fast-volume-renderer``, and ``geometry_type: dreamfusion-fast-hash-grid``
for a geometry that streams. The folder may have any name but `dreamfusion_fast`: threestudio makes a module of that
name, which would hide this package.
"""

from importlib import import_module

try:
    import_module("threestudio.models.renderers.base")
except ImportError as error:
    raise ImportError(
        f"dreamfusion_fast.integrations.threestudio: cannot import {error.name or error}, want threestudio "
        "(github.com/threestudio-project/threestudio) and all that it requires: this module is for its folder custom/"
    ) from error

from dreamfusion_fast.integrations.threestudio.geometry import HashGridGeometry
from dreamfusion_fast.integrations.threestudio.renderer import ThreestudioRenderer

__all__ = ["HashGridGeometry", "ThreestudioRenderer"]
