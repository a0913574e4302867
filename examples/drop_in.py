"""The modules that other projects import, put in their place: once, before a project imports its own."""

from dreamfusion_fast.integrations import gridencoder, nerfacc, raymarching, tinycudann

for module in (nerfacc, tinycudann, gridencoder, raymarching):
    module.install()  # leaves an installed one alone, unless force=True

import nerfacc  # noqa: E402
import raymarching  # noqa: E402
import tinycudann  # noqa: E402
from gridencoder import GridEncoder  # noqa: E402

print(nerfacc.OccGridEstimator, tinycudann.Encoding, GridEncoder, raymarching.march_rays_train)
