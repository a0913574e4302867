"""Turn the weights that `train_prior.py` left (float16, in parts) into the file that the package ships (int8).

    python tools/pack_prior.py OUT --weights dreamfusion_fast/guidance/models/embedded/weights

Into another folder it puts the text encoder, too: `--guidance.name FOLDER` takes that.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from dreamfusion_fast.guidance.config import PRIOR_FILE
from dreamfusion_fast.guidance.models.embedded.guide import TEXT_FILES
from dreamfusion_fast.guidance.models.embedded.model import PriorNetwork, save_prior
from dreamfusion_fast.guidance.models.embedded.text_encoder import WEIGHTS


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("training", type=Path, help="--out folder of train_prior.py")
    parser.add_argument("--weights", type=Path, required=True, help=f"folder to write {PRIOR_FILE} to")
    parser.add_argument(
        "--text-encoder", type=Path, default=WEIGHTS, help="the training's, for a folder without one; %(default)s"
    )
    args = parser.parse_args(arguments)
    state = {}
    for part in sorted(args.training.glob("average-*.safetensors")):
        state |= {name: value.float() for name, value in load_file(part).items()}
    record = json.loads((args.training / "training.json").read_text())
    network = PriorNetwork(record["config"])
    network.load_state_dict(state)  # checks that no part is missing
    args.weights.mkdir(parents=True, exist_ok=True)
    card = {"steps": str(record["steps"])}
    save_prior(network.state_dict(), network.config, args.weights / PRIOR_FILE, card)
    for file in TEXT_FILES:
        if not (args.weights / file).exists():
            shutil.copy(args.text_encoder / file, args.weights / file)


if __name__ == "__main__":
    main()
