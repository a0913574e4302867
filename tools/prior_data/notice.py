"""Write NOTICE: who made what ships, above all the models that the weights were trained on, and under which licences.

python -m prior_data.notice --data DATA > ../NOTICE
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

HEAD = """dreamfusion_fast
Licensed under the Apache License, Version 2.0 (see LICENSE).

Viewer
======
dreamfusion_fast/viewer/model-viewer.min.js is <model-viewer> 4.4.0 (https://modelviewer.dev), unchanged. Copyright
Google LLC, Apache License, Version 2.0. It holds parts of three.js (MIT), lit (BSD-3-Clause) and fflate (MIT). All
licences: licenses/model-viewer.txt.

Weights of the embedded prior and of the amortised start
========================================================
The diffusion model shipped in dreamfusion_fast/guidance/models/embedded/weights and the network shipped in
dreamfusion_fast/training/weights were trained on pictures rendered from the 3D models listed below. They come from
Sweet Home 3D's additional furniture libraries 1.8 (https://www.sweethome3d.com), as packaged in Debian's
sweethome3d-furniture 1.8-1, cleaned and converted to OBJ by Emmanuel Puybaret (eTeks). The models themselves are not
part of this package; their pictures were rendered at 64x64, some of them recoloured. Their licences, in full:
licenses/sweethome3d-furniture.txt. No creator endorses this project.

The text encoder of both derives from sentence-transformers/all-MiniLM-L6-v2 (Apache License, Version 2.0): vocabulary
pruned, weights quantised.
"""
LIBRARIES = {
    "BlendSwap-CC-0": "Blend Swap models (https://www.blendswap.com), CC0 1.0; credits are given although not required",
    "BlendSwap-CC-BY": "Blend Swap models (https://www.blendswap.com), Creative Commons Attribution 3.0",
    "KatorLegaz": "Copyright 2003-2008 Andrew Kator and Jennifer Legaz, Creative Commons Attribution 3.0 United States",
    "Reallusion": "Copyright 2008-2015 Reallusion (http://www.reallusion.com), "
    "Creative Commons Attribution 3.0 United States",
    "Scopia": "Copyright 2010-2012 Scopia Visual Interfaces Systems, s.l. (http://www.scopia.es), "
    "Creative Commons Attribution 3.0",
}
WIDTH = 118


def _wrapped(text: str) -> str:
    lines, line = [], "  "
    for word in text.split(" "):
        if len(line) + len(word) > WIDTH:
            lines.append(line.rstrip())
            line = "    "
        line += word + " "
    return "\n".join([*lines, line.rstrip()])


def notice(models: list[dict]) -> str:
    """The whole text, creators sorted by name within each library."""
    sections = [HEAD]
    for library, credit in LIBRARIES.items():
        works: dict[str, list[str]] = defaultdict(list)
        for model in models:
            if model["library"] == library:
                works[model["creator"]].append(model["name"])
        sections.append(f"{credit}\n" + "-" * min(len(credit), WIDTH))
        for creator in sorted(works, key=str.lower):
            names = sorted(set(works[creator]))
            what = f"{len(works[creator])} models" if len(works[creator]) > 30 else ", ".join(names)
            sections.append(_wrapped(f"{creator}: {what}"))
        sections.append("")
    return "\n".join(sections)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder with models.json")
    models = json.loads((parser.parse_args().data / "models.json").read_text(encoding="utf-8"))
    print(notice(models), end="")


if __name__ == "__main__":
    main()
