"""The interface of tiny-cuda-nn's PyTorch bindings over the ops of this package, on CPU and CUDA tensors.

``from dreamfusion_fast.integrations import tinycudann as tcnn``, or `install` once, before the first
``import tinycudann``. Checkpoints load from one to the other: parameters lie in one flat tensor, as there.

Differences: any batch size is taken as it is; second derivatives exist everywhere, those of networks included; on a CPU
everything is float32. On a GPU results are float16, as there, unless float32 is asked for; tables, and gradients behind
that of the result, are wider. Initial parameters come from the same distributions, and a seed gives the same ones on
every device, but not those of tiny-cuda-nn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamfusion_fast.integrations._names import deferred
from dreamfusion_fast.integrations.tinycudann._install import install

if TYPE_CHECKING:
    from dreamfusion_fast.integrations.tinycudann.modules import (
        Encoding,
        Module,
        Network,
        NetworkWithInputEncoding,
        free_temporary_memory,
    )
else:
    _OURS = ("Encoding", "Module", "Network", "NetworkWithInputEncoding", "free_temporary_memory")
    __getattr__, __dir__ = deferred(__name__, dict.fromkeys(_OURS, f"{__name__}.modules"))

__all__ = ["Encoding", "Module", "Network", "NetworkWithInputEncoding", "free_temporary_memory", "install"]
