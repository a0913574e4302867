"""Turn the weights that `train_prior.py` left (float16, in parts) into the file that the package ships (int8).

python tools/pack_prior.py OUT --weights dreamfusion_fast/guidance/models/embedded/weights
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file

from dreamfusion_fast.guidance.models.embedded.model import PriorNetwork, save_prior


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("training", type=Path, help="--out folder of train_prior.py")
    parser.add_argument("--weights", type=Path, required=True, help="folder to write prior.safetensors.gz to")
    args = parser.parse_args()
    state = {}
    for part in sorted(args.training.glob("average-*.safetensors")):
        state |= {name: value.float() for name, value in load_file(part).items()}
    network = PriorNetwork()
    network.load_state_dict(state)  # checks that no part is missing
    steps = json.loads((args.training / "training.json").read_text())["steps"]
    args.weights.mkdir(parents=True, exist_ok=True)
    save_prior(network.state_dict(), network.config, args.weights / "prior.safetensors.gz", {"steps": str(steps)})


if __name__ == "__main__":
    main()
