"""Render finished runs as the judge wants them: eight views on white, lit as the real models of its ceiling were.

dreamfusion-fast generate "a barrel" --out out/a_barrel          # and so on for the prompts of prior_judge_prompts.json
python tools/judge_views.py out/a_barrel out/a_chair --out renders
cd tools && python -m prior_data.judge score --prompts prior_judge_prompts.json ../renders
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dreamfusion_fast.export import save_png
from dreamfusion_fast.rendering import orbit_cameras
from dreamfusion_fast.scene import Scene
from dreamfusion_fast.training.generator import Generator
from dreamfusion_fast.training.scenes import make_scene

SIZE, VIEWS, ELEVATION_DEG = 224, 8, 15.0
AMBIENT, DIFFUSE = 0.55, 0.5  # of prior_data.judge


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of `generate`")
    parser.add_argument("--untrained", action="store_true", help="also the first run's field before its first step")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for run in args.runs:
        generator = Generator.resume(run)
        save_views(generator.scene(), args.out / generator.config.prompt.replace(" ", "_"))
    if args.untrained:
        config = generator.config
        fresh = make_scene(config, generator.device, torch.Generator().manual_seed(config.seed))
        fresh.occupancy.update(fresh.field, 0)
        save_views(fresh, args.out / "untrained_field")


def save_views(scene: Scene, folder: Path) -> None:
    """Write `VIEWS` pictures around the object, the first from the front."""
    folder.mkdir(parents=True, exist_ok=True)
    cameras = orbit_cameras(VIEWS, ELEVATION_DEG)
    for index, image in enumerate(scene.render(cameras, SIZE, "lambertian", AMBIENT, DIFFUSE)):
        save_png(folder / f"{index}.png", image)
    print(folder)


if __name__ == "__main__":
    main()
