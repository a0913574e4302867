"""Train the embedded prior on the rendered catalogue (see tools/README.md), for a given time on one GPU.

    python tools/train_prior.py --data DATA --text-encoder WEIGHTS --out OUT --state STATE --minutes 9

The learning rate follows the clock, or with `--total-steps` the steps: linear warm-up, cosine to zero. A run is cut
into calls: each goes on from `--state`, until it says "done". Light, shading, colour, background and captions are drawn
anew for every sample (`tools/prior_data/batches.py`). With `--views 4` most steps show groups of four views of one
object, which the network reads together, and the others single views, as for MVDream (Shi et al. 2023, arXiv
2308.16512). The last call ends with a probe: the loss on views never trained on, with each condition right, wrong and
absent.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from prior_data.batches import Batch, CatalogueSampler
from prior_data.probe import autocast, probe, sample_sheet
from safetensors.torch import save_file
from torch import Tensor, nn
from training_loop import Call, Phase, Report, run, seed_step
from training_state import load_state, optimizer_state, save_state

from dreamfusion_fast.guidance.models.embedded.model import (
    TRAIN_TIMESTEPS,
    UNET_CONFIG,
    PriorNetwork,
    alphas_cumprod,
    load_prior,
)
from dreamfusion_fast.io import write_text

# Share of the steps that show groups, where there are any.
GROUPS_SHARE = 0.7
BINS = 10
COLUMNS = ("loss", "alone", "grouped", *(f"t {bin / BINS:.1f}" for bin in range(BINS)))
_STREAM = 1
# The probe, the sheets and the files take about this long, seconds.
_AFTERWARDS = 30.0


def v_loss(network: Callable[..., Tensor], batch: Batch, abar_table: Tensor, group: int = 1) -> tuple[Tensor, Tensor]:
    """Per-sample v-prediction loss `[n]` and timesteps `[n]`, one for each group of views, with a noise for each view.

    Little weight below t = 0.15, none below 0.02, where the task is noise.
    """
    n, device = len(batch.images), batch.images.device
    timestep = torch.randint(int(0.02 * TRAIN_TIMESTEPS), TRAIN_TIMESTEPS, (n // group,), device=device)
    timestep = timestep.repeat_interleave(group)
    abar = abar_table[timestep].view(-1, 1, 1, 1)
    noise = torch.randn_like(batch.images)
    noisy = abar.sqrt() * batch.images + (1 - abar).sqrt() * noise
    target = abar.sqrt() * noise - (1 - abar).sqrt() * batch.images
    with autocast(device):
        prediction = network(noisy, timestep, batch.tokens, batch.condition)
    weight = (timestep / (0.15 * TRAIN_TIMESTEPS)).clamp(max=1.0)
    return (prediction.float() - target).square().flatten(1).mean(1) * weight, timestep


def reported(loss: Tensor, timestep: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Sums and counts for `COLUMNS` of losses `[n]` at timesteps `[n]`."""
    sums, counts = loss.new_zeros(2, len(COLUMNS))
    columns = [
        torch.zeros_like(timestep),
        torch.full_like(timestep, 1 + (group > 1)),
        3 + timestep * BINS // TRAIN_TIMESTEPS,
    ]
    index = torch.cat(columns)
    sums.index_add_(0, index, loss.detach().repeat(3))
    counts.index_add_(0, index, torch.ones_like(loss).repeat(3))
    return sums, counts


def grouped(network: nn.Module, group: int, compile: bool) -> Callable[..., Tensor]:
    """The network for groups of one size. Compiled, it is one graph, whatever has been compiled for other groups."""
    fixed = functools.partial(network, group=group)
    return torch.compile(fixed, dynamic=False) if compile else fixed


class PriorTraining:
    """Networks, their state, and the steps.

    Args:
        args: of the command line.
        call: limits of this call.

    Raises:
        ValueError: a state of another network or seed, or a batch that is no multiple of the views.
    """

    def __init__(self, args: argparse.Namespace, call: Call) -> None:
        self.args, self.call = args, call
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        seed_step(args.seed, 0, 0)
        self.network = first_network(args).to(self.device)
        self.views = self.network.views
        if args.batch % self.views:
            raise ValueError(f"--batch: got {args.batch}, want a multiple of {self.views}, the views of a group")
        self.parameters = list(self.network.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        seconds = 60 * args.total_minutes
        self.phase = Phase("prior", _STREAM, args.lr, args.total_steps, seconds, elapsed=60 * args.elapsed_minutes)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=self.device.type == "cuda"
        )
        self.log: list[dict[str, Any]] = []
        if args.state is not None:
            self._resume(load_state(args.state, self.device))
        self.sampler = CatalogueSampler(args.data, args.text_encoder, self.device)
        self.call.say(f"data: {self.sampler.summary()}")
        self.abar = alphas_cumprod().to(self.device)

    def _identity(self) -> dict[str, Any]:
        return {"config": json.dumps(self.network.config), "seed": self.args.seed, "batch": self.args.batch}

    def _resume(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        for name, wanted in self._identity().items():
            if state["identity"][name] != wanted:
                raise ValueError(f"--state: it was made with {name} {state['identity'][name]}, got {wanted}")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.log = state["average"], state["log"]
        self.phase.step, self.phase.elapsed = state["step"], state["elapsed"]
        self.call.say(f"goes on from step {self.phase.step}")

    def run(self) -> bool:
        """Train until it is done or the call is over, and save; whether it is done."""
        args = self.args
        compile = self.device.type == "cuda" if args.compile is None else args.compile
        sizes = {1, self.views}
        networks = {group: grouped(self.network, group, compile) for group in sizes}

        def step_loss(step: int) -> tuple[Tensor, Tensor, Tensor]:
            seed_step(args.seed, _STREAM, step)
            # Drawn on the CPU, so that nothing waits for a GPU; all of a step are of one kind, so there are two graphs.
            group = self.views if self.views > 1 and float(torch.rand(())) < GROUPS_SHARE else 1
            loss, timestep = v_loss(networks[group], self.sampler.batch(args.batch, group), self.abar, group)
            return loss.mean(), *reported(loss, timestep, group)

        report = Report(self.phase, self.call, COLUMNS, self.log)
        first = self.phase.step
        run(self.phase, step_loss, self.parameters, self.optimizer, self.call, report, self.average, args.save_every,
            self._save)  # fmt: skip
        if self.phase.step > first:
            self._save()
        return self.phase.progress >= 1

    def _save(self) -> None:
        if self.args.state is None:
            return
        state = {
            "identity": self._identity(),
            "network": self.network.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "average": self.average,
            "log": self.log,
            "step": self.phase.step,
            "elapsed": self.phase.elapsed,
        }
        save_state(self.args.state, state, self.phase.step)

    def finish(self, done: bool) -> None:
        """Write the averaged weights, the record and the sheets; if it is done, with the probe."""
        args, out, network = self.args, self.args.out, self.network
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.average, strict=True):
                parameter.copy_(value)
        save_in_parts(network.state_dict(), out, "average")
        network.eval()
        record: dict[str, Any] = {
            "config": network.config,
            "steps": self.phase.step,
            "images": self.phase.step * args.batch,
            "training_seconds": round(self.phase.elapsed, 1),
            "done": done,
            "log": self.log,
        }
        write_text(out / "training.json", json.dumps(record, indent=1))
        for group in dict.fromkeys((1, self.views)):
            name = "single views" if group == 1 else "groups"
            seed_step(args.seed, 2, 0)
            if args.sheet_steps:
                sheet = sample_sheet(network, self.sampler.encoder, self.device, steps=args.sheet_steps, group=group)
                sheet.save(out / ("samples.png" if group == 1 else "samples-groups.png"))
            if done and args.probe_views:
                rows = record.setdefault("probe", {})[name] = probe(
                    network, self.sampler, self.abar, args.probe_views, group
                )
                for row, values in rows.items():
                    print(f"probe, {name}: {row:28s} {values}")
        write_text(out / "training.json", json.dumps(record, indent=1))


def first_network(args: argparse.Namespace) -> PriorNetwork:
    """The network of `--init`, or one of random weights, for so many views."""
    views = {} if args.views is None else {"views": args.views}
    if args.init is None:
        widths = {"block_out_channels": args.channels, "norm_num_groups": args.groups, "attention_head_dim": args.heads}
        return PriorNetwork(UNET_CONFIG | {name: value for name, value in widths.items() if value} | views)
    if args.channels or args.groups or args.heads:
        raise ValueError("--init: its weights have their own widths; omit --channels, --groups and --heads")
    start = load_prior(args.init)
    network = PriorNetwork(start.config | views)
    network.load_state_dict(start.state_dict())
    return network


def save_in_parts(state: dict[str, Tensor], folder: Path, stem: str, limit: int = 15_000_000) -> None:
    """Write float16 weights in files of at most `limit` bytes each."""
    part: dict[str, Tensor] = {}
    size, index = 0, 0
    for name, tensor in state.items():
        half = tensor.detach().half().cpu().contiguous()
        if part and size + half.nbytes > limit:
            save_file(part, folder / f"{stem}-{index}.safetensors")
            part, size, index = {}, 0, index + 1
        part[name] = half
        size += half.nbytes
    save_file(part, folder / f"{stem}-{index}.safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by tools/prior_data/build.py")
    parser.add_argument("--text-encoder", type=Path, required=True, help="folder made by tools/build_text_encoder.py")
    parser.add_argument(
        "--out", type=Path, required=True, help="for weights, record and sheets: at most 6 files, 45 MB"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="this call ends after so long, start included")
    parser.add_argument(
        "--total-minutes", type=float, default=17.6, help="length of the training in all; start-up does not count"
    )
    parser.add_argument("--total-steps", type=int, help="its length in steps, in place of minutes")
    parser.add_argument(
        "--elapsed-minutes", type=float, default=0.0, help="of that length, done by the training --init comes from"
    )
    parser.add_argument("--views", type=int, help="views read together; default: those of --init, or 1")
    parser.add_argument(
        "--init", type=Path, help="folder of a prior.safetensors.gz to start from; default: random weights"
    )
    parser.add_argument("--state", type=Path, help="folder of the whole state: read if it is there, written at the end")
    parser.add_argument("--save-every", type=int, help="steps between saved states; default: at the end of a call")
    parser.add_argument("--batch", type=int, default=256, help="views per step")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--channels", type=int, nargs=3, help="widths, finest level first; default: 128 192 224")
    parser.add_argument("--groups", type=int, help="of the group norms; default: 16")
    parser.add_argument("--heads", type=int, help="of the attention; default: 4")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps of this call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe-views", type=int, default=2048, help="0: no probe")
    parser.add_argument("--sheet-steps", type=int, default=40, help="denoising steps of the sheets; 0: none")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    call = Call(started, started + 60 * args.minutes - _AFTERWARDS, args.steps)
    try:
        training = PriorTraining(args, call)
    except ValueError as error:
        parser.error(str(error))
    done = training.run()
    training.finish(done)
    call.say(f"{'done' if done else 'to be continued'}: {training.phase.step} steps, "
             f"{training.phase.elapsed:.0f} s of training in all")  # fmt: skip


if __name__ == "__main__":
    main()
