"""Train a small latent diffusion model on the embedded prior's data, and write it as a diffusers pipeline.

    python tools/train_latent_prior.py train --data DATA --out OUT --minutes 9.5     # again until it says "done"
    python tools/train_latent_prior.py store OUT --weights WEIGHTS                  # small enough for the repository
    python tools/train_latent_prior.py pack OUT --folder FOLDER                      # or WEIGHTS in place of OUT
    python tools/train_latent_prior.py sample FOLDER --sheet samples.jpg
    python tools/train_latent_prior.py probe FOLDER --data DATA

See tools/README.md. A call of `train` ends after `--minutes`; what it leaves in `--out` (at most eight files of at most
16 MB) is all that the next call needs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from latent_prior import looks
from latent_prior.latents import make_sampler
from latent_prior.networks import Precision, Shape
from latent_prior.pipeline import Pipeline, pack
from latent_prior.store import STORED, store
from latent_prior.training import Settings, Training
from prior_data.probe import SHEET_PROMPTS
from training_loop import Call

# Loading, probe, samples and files after the last step of a call take about this long.
_RESERVE_SECONDS = 25.0
PACKAGE_WEIGHTS = Path(__file__).parents[1] / "dreamfusion_fast" / "guidance" / "models" / "embedded" / "weights"


def train(args: argparse.Namespace) -> None:
    """Subcommand `train`."""
    started = time.monotonic()
    if args.minutes <= 0:
        raise ValueError(f"minutes must be above 0, got {args.minutes}")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    settings = Settings(
        shape=Shape(tuple(args.vae_channels), tuple(args.unet_channels), args.groups),
        vae_steps=args.vae_steps,
        unet_steps=args.unet_steps,
        vae_seconds=60 * args.vae_minutes,
        unet_seconds=60 * args.unet_minutes,
        vae_batch=args.vae_batch,
        unet_batch=args.unet_batch,
        vae_rate=args.vae_rate,
        unet_rate=args.unet_rate,
        pool=args.pool,
        pool_block=args.pool_block,
        renew_every=args.renew_every,
        seed=args.seed,
        save_every=args.save_every,
        compile=False if args.no_compile else None,
        probe_views=args.probe_views,
        sheet_steps=args.sheet_steps,
    )
    deadline = started + max(60 * args.minutes - _RESERVE_SECONDS, 0.0)
    call = Call(started, deadline, args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    done = Training(args.data, args.text_encoder, args.out, settings, call).run()
    call.say("done" if done else "not done: call again with the same --out")


def _print_sizes(sizes: dict[str, int]) -> None:
    print("  ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()))


def store_weights(args: argparse.Namespace) -> None:
    """Subcommand `store`."""
    _print_sizes(store(args.out, args.weights))


def pack_folder(args: argparse.Namespace) -> None:
    """Subcommand `pack`."""
    _print_sizes(pack(args.source, args.text_encoder, args.folder))


def sample(args: argparse.Namespace) -> None:
    """Subcommand `sample`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = Pipeline(args.folder, device)
    prompts = tuple(args.prompt) if args.prompt else SHEET_PROMPTS
    picture = looks.sample_sheet(
        pipeline.vae, pipeline.unet, pipeline.scheduler, pipeline.encoder, Precision(device, device.type == "cuda"),
        prompts, args.guidance_scale, args.steps, args.seed,
    )  # fmt: skip
    looks.save_sheet(picture, args.sheet)


def probe(args: argparse.Namespace) -> None:
    """Subcommand `probe`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = Pipeline(args.folder, device)
    sampler = make_sampler(args.data, args.text_encoder, device)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod.to(device)
    precision = Precision(device, device.type == "cuda")
    for name, row in looks.probe(pipeline.vae, pipeline.unet, sampler, alphas_cumprod, precision, args.views).items():
        print(f"probe {name:16s} {row}")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    settings, shape = Settings(), Shape()

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text)
        added.set_defaults(function=function)
        if name not in ("store", "sample"):
            added.add_argument("--text-encoder", type=Path, default=PACKAGE_WEIGHTS, help="default: the package's")
        return added

    one = command("train", train, "train, or go on with a training")
    one.add_argument("--data", type=Path, required=True, help="folder made by prior_data.build")
    one.add_argument("--out", type=Path, required=True, help="state, training.json, autoencoder.jpg, samples.jpg")
    one.add_argument("--minutes", type=float, default=9.5, help="this call ends after so long, start included")
    one.add_argument("--vae-minutes", type=float, default=settings.vae_seconds / 60, help="of training, in all")
    one.add_argument("--unet-minutes", type=float, default=settings.unet_seconds / 60, help="of training, in all")
    one.add_argument("--vae-steps", type=int, help="length in steps in place of minutes")
    one.add_argument("--unet-steps", type=int, help="length in steps in place of minutes")
    one.add_argument("--steps", type=int, default=10**12, help="stop after so many steps of this call")
    one.add_argument("--save-every", type=int, help="steps; default: at the end of a phase and of a call only")
    one.add_argument("--vae-channels", type=int, nargs=3, default=shape.vae_channels)
    one.add_argument("--unet-channels", type=int, nargs=3, default=shape.unet_channels)
    one.add_argument("--groups", type=int, default=shape.groups, help="of the group norms")
    one.add_argument("--vae-batch", type=int, default=settings.vae_batch)
    one.add_argument("--unet-batch", type=int, default=settings.unet_batch)
    one.add_argument("--vae-rate", type=float, default=settings.vae_rate)
    one.add_argument("--unet-rate", type=float, default=settings.unet_rate)
    one.add_argument("--pool", type=int, default=settings.pool, help="latents kept on the device")
    one.add_argument("--pool-block", type=int, default=settings.pool_block, help="of them made anew at a time")
    one.add_argument("--renew-every", type=int, default=settings.renew_every, help="steps from block to block")
    one.add_argument("--probe-views", type=int, default=settings.probe_views)
    one.add_argument("--sheet-steps", type=int, default=settings.sheet_steps, help="denoising steps of samples.jpg")
    one.add_argument("--seed", type=int, default=settings.seed)
    one.add_argument("--no-compile", action="store_true")

    two = command("store", store_weights, "write the trained weights as int8")
    two.add_argument("out", type=Path, help="--out of the training")
    two.add_argument("--weights", type=Path, required=True, help="folder to write to; what it stores is replaced")

    three = command("pack", pack_folder, "write the pipeline folder")
    three.add_argument(
        "source",
        type=Path,
        nargs="?",
        default=STORED,
        help="--out of the training, or --weights of store; default: %(default)s",
    )
    three.add_argument("--folder", type=Path, required=True)

    four = command("sample", sample, "draw a sheet by plain DDIM")
    four.add_argument("folder", type=Path)
    four.add_argument("--sheet", type=Path, required=True, help="picture to write")
    four.add_argument("--prompt", nargs="*", help="default: those of the embedded prior's sheet")
    four.add_argument("--guidance-scale", type=float, default=3.0)
    four.add_argument("--steps", type=int, default=40)
    four.add_argument("--seed", type=int, default=0)

    five = command("probe", probe, "loss on held-out views with right, wrong and no captions")
    five.add_argument("folder", type=Path)
    five.add_argument("--data", type=Path, required=True)
    five.add_argument("--views", type=int, default=2048)

    args = parser.parse_args(arguments)
    try:
        args.function(args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
