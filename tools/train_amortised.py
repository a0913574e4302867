"""Train the amortised initialisation: one pass of a network from a prompt to the planes of an object.

    python tools/train_amortised.py train --data DATA --state STATE --minutes 9.5      # again until it says "done"
    python tools/train_amortised.py pack STATE --data DATA --file amortised.safetensors.gz
    python tools/train_amortised.py evaluate amortised.safetensors.gz --data DATA
    python tools/train_amortised.py sheet amortised.safetensors.gz --picture sheet.png

See tools/README.md. A call of `train` ends after `--minutes`; what it leaves in `--state` (files of at most 15.5 MB,
and the record training.json) is all that the next call needs. `dreamfusion-fast generate --init FILE` takes what `pack`
writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from amortised.batches import ObjectSampler
from amortised.looks import PROMPTS, Sheet, evaluate
from amortised.packing import THRESHOLD, pack
from amortised.rendering import ObjectRenderer
from amortised.training import Settings, Training
from prior_data.batches import CatalogueSampler
from training_loop import Call

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.models.embedded.text_encoder import WEIGHTS, TextEncoder
from dreamfusion_fast.io import write_text
from dreamfusion_fast.training.amortised import load_amortised

# Files after the last step of a call take about this long.
_RESERVE_SECONDS = 5.0
_LOOK_SAMPLES = 256  # along the diagonal of the box, twice as many as in training


def train(args: argparse.Namespace) -> None:
    """Subcommand `train`."""
    started = time.monotonic()
    if args.minutes <= 0:
        raise ValueError(f"minutes must be above 0, got {args.minutes}")
    torch.set_float32_matmul_precision("high")
    base = Settings()
    network = dataclasses.replace(
        base.network,
        **{
            name: getattr(args, name)
            for name in ("width", "heads", "blocks", "tokens", "patch", "patch_features", "features", "code_width")
        },
    )
    settings = Settings(
        network=network,
        field=dataclasses.replace(base.field, hidden=args.hidden, hidden_layers=args.hidden_layers),
        steps=args.train_steps,
        seconds=60 * args.train_minutes,
        objects=args.objects,
        views=args.views,
        rays=args.rays,
        samples_across=args.samples_across,
        rate=args.rate,
        code_rate=args.code_rate,
        distortion=args.distortion,
        seed=args.seed,
        save_every=args.save_every,
    )
    call = Call(started, started + max(60 * args.minutes - _RESERVE_SECONDS, 0.0), args.steps)
    args.state.mkdir(parents=True, exist_ok=True)
    done = Training(args.data, args.text_encoder, args.state, settings, call).run()
    call.say("done" if done else "not done: call again with the same --state")


def pack_file(args: argparse.Namespace) -> None:
    """Subcommand `pack`."""
    size = pack(args.state, args.data, TextEncoder(args.text_encoder), args.file, args.threshold)
    print(f"{args.file}: {size / 1e6:.1f} MB")


def evaluate_file(args: argparse.Namespace) -> None:
    """Subcommand `evaluate`."""
    device = _device()
    model = load_amortised(args.file)[0].to(device)
    sampler = ObjectSampler(CatalogueSampler(args.data, args.text_encoder, device, suffixes=("",)))
    if len(sampler.models) != len(model.codes):
        raise ValueError(f"data: has {len(sampler.models)} models to train on, {args.file} {len(model.codes)}")
    results = evaluate(model, sampler, ObjectRenderer(model.field, _LOOK_SAMPLES, device), args.objects)
    for name, row in results.items():
        print(f"PSNR {name:20s} {row}")
    if args.record is not None:
        write_text(args.record, json.dumps(results, indent=1) + "\n")


def draw_sheet(args: argparse.Namespace) -> None:
    """Subcommand `sheet`."""
    device = _device()
    model, captions = load_amortised(args.file)
    model = model.to(device)
    renderer = ObjectRenderer(model.field, _LOOK_SAMPLES, device)
    with torch.no_grad():
        sheet = Sheet(model, captions, renderer, TextEncoder(args.text_encoder), device)
        picture = sheet.draw(tuple(args.prompt)) if args.prompt else sheet.draw()
    picture.save(args.picture)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    settings = Settings()
    shape = settings.network

    def command(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text)
        added.set_defaults(function=function)
        added.add_argument("--text-encoder", type=Path, default=WEIGHTS, help="default: the package's")
        if name != "sheet":
            added.add_argument("--data", type=Path, required=True, help="folder made by prior_data.build")
        return added

    one = command("train", train, "train, or go on with a training")
    one.add_argument("--state", type=Path, required=True, help="folder of the training's state and its record")
    one.add_argument("--minutes", type=float, default=9.5, help="this call ends after so long, start included")
    one.add_argument("--steps", type=int, default=10**12, help="stop after so many steps of this call")
    one.add_argument("--train-minutes", type=float, default=settings.seconds / 60, help="of training, in all")
    one.add_argument("--train-steps", type=int, help="length in steps in place of minutes")
    one.add_argument("--save-every", type=int, help="steps; default: at the end of a call only")
    one.add_argument("--objects", type=int, default=settings.objects, help="per step")
    one.add_argument("--views", type=int, default=settings.views, help="of each object and step")
    one.add_argument("--rays", type=int, default=settings.rays, help="of each view, half of them at the object")
    one.add_argument("--samples-across", type=int, default=settings.samples_across, help="along the box's diagonal")
    one.add_argument("--rate", type=float, default=settings.rate, help="peak learning rate of the network")
    one.add_argument("--code-rate", type=float, default=settings.code_rate, help="peak learning rate of the codes")
    one.add_argument("--distortion", type=float, default=settings.distortion, help="weight of the distortion loss")
    one.add_argument("--seed", type=int, default=settings.seed)
    for name in ("width", "heads", "blocks", "tokens", "patch", "patch_features", "features", "code_width"):
        option = "--" + name.replace("_", "-")
        one.add_argument(option, type=int, default=getattr(shape, name), help="of the network")
    one.add_argument("--hidden", type=int, default=settings.field.hidden, help="width of the field's MLP")
    one.add_argument("--hidden-layers", type=int, default=settings.field.hidden_layers, help="of the field's MLP")

    two = command("pack", pack_file, "write the file that runs start from")
    two.add_argument("state", type=Path, help="--state of the training")
    two.add_argument("--file", type=Path, required=True, help="such as amortised.safetensors.gz")
    two.add_argument("--threshold", type=float, default=THRESHOLD, help="least similarity of a known prompt")

    three = command("evaluate", evaluate_file, "PSNR on views and models that were held out")
    three.add_argument("file", type=Path)
    three.add_argument("--objects", type=int, default=200, help="that were trained on, at most")
    three.add_argument("--record", type=Path, help="JSON file to write")

    four = command("sheet", draw_sheet, "draw prompts, novel colours, and what lies between two prompts")
    four.add_argument("file", type=Path)
    four.add_argument("--picture", type=Path, required=True, help="to write")
    four.add_argument("--prompt", nargs="*", help=f"default: {len(PROMPTS)} of them")

    args = parser.parse_args(arguments)
    try:
        args.function(args)
    except (ValueError, UserError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
