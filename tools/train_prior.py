"""Train the embedded prior on the rendered catalogue (see tools/README.md), for a given time on one GPU.

    python tools/train_prior.py --data DATA --text-encoder WEIGHTS --out OUT --minutes 19

The learning rate follows the clock (linear warm-up, cosine to zero at `--total-minutes`), so that a run fits the time
there is; a run cut in several calls goes on from `--state`. Light, shading, colour, background and captions are drawn
anew for every sample (`tools/prior_data/batches.py`). Ends with a probe: the loss on views never trained on, with each
condition right, wrong and absent.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from prior_data.batches import Batch, CatalogueSampler
from prior_data.probe import probe, sample_sheet
from safetensors.torch import save_file
from torch import Tensor

from dreamfusion_fast.guidance.models.embedded.model import TRAIN_TIMESTEPS, PriorNetwork, alphas_cumprod, load_prior

WARMUP_STEPS = 500
EMA_DECAY = 0.9995


def v_loss(network: torch.nn.Module, batch: Batch, abar_table: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample v-prediction loss `[n]` and timesteps `[n]`; little weight below t = 0.15, none below 0.02, where the
    task is noise."""
    n, device = len(batch.images), batch.images.device
    timestep = torch.randint(int(0.02 * TRAIN_TIMESTEPS), TRAIN_TIMESTEPS, (n,), device=device)
    abar = abar_table[timestep].view(-1, 1, 1, 1)
    noise = torch.randn_like(batch.images)
    noisy = abar.sqrt() * batch.images + (1 - abar).sqrt() * noise
    target = abar.sqrt() * noise - (1 - abar).sqrt() * batch.images
    with torch.autocast(device.type, torch.bfloat16):
        prediction = network(noisy, timestep, batch.tokens, batch.condition)
    weight = (timestep / (0.15 * TRAIN_TIMESTEPS)).clamp(max=1.0)
    return (prediction.float() - target).square().flatten(1).mean(1) * weight, timestep


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


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by tools/prior_data/build.py")
    parser.add_argument("--text-encoder", type=Path, required=True, help="folder made by tools/build_text_encoder.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0, help="this call ends after so long, start included")
    parser.add_argument("--total-minutes", type=float, help="length of the learning-rate schedule (default: --minutes)")
    parser.add_argument(
        "--init", type=Path, help="folder of a prior.safetensors.gz to start from; default: random weights"
    )
    parser.add_argument("--state", type=Path, help="optimiser state, read if it exists, written at the end")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps of this call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe-views", type=int, default=2048)
    parser.add_argument("--sheet-steps", type=int, default=40, help="denoising steps of samples.png")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    total_seconds = 60 * (args.total_minutes or args.minutes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)

    sampler = CatalogueSampler(args.data, args.text_encoder, device)
    print(f"{time.monotonic() - started:6.1f} s  data: {sampler.summary()}", flush=True)
    network = load_prior(args.init).train().requires_grad_(True) if args.init else PriorNetwork()
    network = network.to(device)
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    step, elapsed_before = 0, 0.0
    if args.state and args.state.exists():
        state = torch.load(args.state, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, elapsed_before = state["average"], state["step"], state["elapsed"]
        torch.manual_seed(args.seed + step)
    abar = alphas_cumprod().to(device)
    trained = network if args.no_compile else torch.compile(network)

    bins = torch.zeros(2, 10, device=device)
    first_step, train_started, last_report = step, time.monotonic(), time.monotonic()
    log: list[dict[str, object]] = []
    deadline = started + 60 * args.minutes - 25  # the probe, the sheet and the files take about this long
    while time.monotonic() < deadline and step - first_step < args.steps:
        elapsed = elapsed_before + time.monotonic() - train_started
        budget = total_seconds - 60.0  # start-up and probe of the calls do not train
        rate = (
            args.lr * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1.0, elapsed / budget)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, timestep = v_loss(trained, sampler.batch(args.batch), abar)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        index = timestep * 10 // TRAIN_TIMESTEPS
        bins[0].index_add_(0, index, loss.detach())
        bins[1].index_add_(0, index, torch.ones_like(loss))
        if step - first_step in (1, 20) or step % 500 == 0:
            per_bin = (bins[0] / bins[1].clamp(min=1)).tolist()
            total = (bins[0].sum() / bins[1].sum()).item()
            images = bins[1].sum().item()
            now = time.monotonic()
            print(
                f"{now - started:6.1f} s  step {step}  loss {total:.4f}  lr {rate:.1e}  "
                f"{images / (now - last_report):.0f} images/s  " + " ".join(f"{b:.3f}" for b in per_bin),
                flush=True,
            )
            if not math.isfinite(total):
                raise SystemExit("the loss is not finite; nothing was written")
            log.append({"step": step, "loss": total, "bins": per_bin, "lr": rate})
            bins.zero_()
            last_report = now

    elapsed = elapsed_before + time.monotonic() - train_started
    if args.state:
        args.state.parent.mkdir(parents=True, exist_ok=True)
        whole = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
        torch.save(whole | {"elapsed": elapsed}, args.state)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    save_in_parts(network.state_dict(), args.out, "average")
    network.eval()
    result = {"steps": step, "images": step * args.batch, "training_seconds": elapsed, "log": log}
    (args.out / "training.json").write_text(json.dumps(result, indent=1))
    result["probe"] = probe(network, sampler, abar, args.probe_views)
    (args.out / "training.json").write_text(json.dumps(result, indent=1))
    for name, rows in result["probe"].items():
        print(f"probe {name:28s} {rows}")
    sample_sheet(network, sampler.encoder, device, steps=args.sheet_steps).save(args.out / "samples.png")
    print(f"{time.monotonic() - started:6.1f} s  done: {step} steps, {elapsed:.0f} s of training in all", flush=True)


if __name__ == "__main__":
    main()
