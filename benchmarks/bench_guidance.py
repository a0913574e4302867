"""The cost of guidance by large diffusion models: autoencoder and U-Net with random weights of the real architectures.

Per row: milliseconds, the median over the repeats after warm-up, by CUDA events, each started on an idle GPU; and MiB,
torch's peak above the weights, allocated and reserved. Rows:

- vae: images of the model's size to latents and back to the images' gradient. diffusers: its module under autograd,
  alone and as a CUDA graph would see it; ours: `LatentEncoder`, also with recomputation; with --dtype float32 also
  rescaled and in float16, as SDXL's runs, whose error is then beside float32;
- unet: the guided pair of one view in one batch. eager, diffusers' module; graph, the same captured; fused, after
  `fuse`, captured; compiled, by torch.compile, captured (with the seconds that took).

    python benchmarks/bench_guidance.py                          # needs a GPU; a minute without --compile
    python benchmarks/bench_guidance.py --parts vae --models sd --views 1 4
    python benchmarks/bench_guidance.py --parts vae --models sd --kernels 12    # the longest kernels of each row, too
    python benchmarks/bench_guidance.py --parts vae --models sdxl --dtype float32   # SDXL's autoencoder, both ways
    python benchmarks/bench_guidance.py --compile --out          # written to benchmarks/results
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from architectures import TOKENS, UNETS, VAES, build
from machine import RESULTS, describe, headline, write_result
from measure import MB, Clock
from torch import Tensor

from dreamfusion_fast.gpu.capture import CapturedFunction
from dreamfusion_fast.networks.fused_unet import fuse
from dreamfusion_fast.networks.half_range import to_half
from dreamfusion_fast.networks.latent_encoder import LatentEncoder


@dataclass
class Row:
    """One row of the table; None: not measured, `note` says why."""

    part: str
    model: str
    variant: str
    views: int
    dtype: str
    ms: float | None = None
    peak_mb: float | None = None
    reserved_mb: float | None = None
    weights_mb: float | None = None
    error: float | None = None
    """Of the gradient or prediction, by norm, relative to the first variant of the same model."""
    note: str = ""


def measure(row: Row, run: Callable[[], Tensor], repeats: int) -> Tensor:
    """Fill in time and memory of `run`; its last result."""
    device = torch.device("cuda")
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    before, before_reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    row.note = f"first call {time.perf_counter() - start:.0f} s"  # where kernels are compiled and graphs captured
    for _ in range(2):
        result = run()
    torch.cuda.synchronize()
    row.peak_mb = (torch.cuda.max_memory_allocated() - before) / MB
    row.reserved_mb = (torch.cuda.max_memory_reserved() - before_reserved) / MB
    times = []
    for _ in range(repeats):
        clock = Clock(device)
        clock.mark()
        result = run()
        clock.mark()
        times += clock.milliseconds()
    row.ms = statistics.median(times)
    return result


def print_kernels(run: Callable[[], Tensor], most: int) -> None:
    """The work of the GPU in one `run`: kernels by the time that they take in all, microseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times: dict[str, tuple[float, int]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            time_before, count = times.get(event.name, (0.0, 0))
            times[event.name] = (time_before + event.device_time, count + 1)
    print(f"    {sum(time for time, _ in times.values()):8.0f} us in all")
    for name, (microseconds, count) in sorted(times.items(), key=lambda item: -item[1][0])[:most]:
        print(f"    {microseconds:8.0f} us {count:4} x {name[:100]}")


def free_memory() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def vae_rows(name: str, views: int, dtype: torch.dtype, repeats: int, kernels: int) -> Iterator[Row]:
    """The autoencoder's encoder, forward and back to the image."""
    vae = build("vae", name, dtype, "cuda")
    vae.decoder = None
    size, channels = VAES[name]["sample_size"], VAES[name]["latent_channels"]
    generator = torch.Generator("cuda").manual_seed(0)
    images = torch.rand(views, 3, size, size, device="cuda", generator=generator)
    mix = torch.randn(views, channels, size // 8, size // 8, device="cuda", generator=generator)
    weights = sum(p.numel() * p.element_size() for p in vae.parameters()) / MB

    def gradient(encode: Callable[[Tensor], Tensor]) -> Tensor:
        given = images.clone().requires_grad_()
        return torch.autograd.grad(encode(given * 2 - 1), given, mix.to(dtype))[0]

    def diffusers(x: Tensor) -> Tensor:
        return vae.encode(x.to(dtype)).latent_dist.mean

    def rescaled(recompute: bool) -> LatentEncoder:
        to_half(vae)
        return LatentEncoder(vae, recompute)

    wanted: Tensor | None = None
    variants: list[tuple[str, Callable[[], Callable[[Tensor], Tensor]]]] = [
        ("diffusers", lambda: diffusers),
        ("ours", lambda: LatentEncoder(vae)),
        ("ours, recomputed", lambda: LatentEncoder(vae, recompute=True)),
    ]
    if dtype == torch.float32:  # last: they change the module
        variants += [("rescaled float16", lambda: rescaled(False)), ("same, recomputed", lambda: rescaled(True))]
    for variant, make in variants:
        row = Row("vae", name, variant, views, str(dtype).split(".")[1], weights_mb=weights)
        try:
            encode = make()
            found = measure(row, lambda encode=encode: gradient(encode), repeats)  # type: ignore[misc]
            if wanted is None:
                wanted = found.clone()
            row.error = float((found - wanted).norm() / wanted.norm())
            if kernels:
                print_kernels(lambda encode=encode: gradient(encode), kernels)  # type: ignore[misc]
        except torch.OutOfMemoryError as error:
            row.note = str(error).split(".")[0]
        encode = found = None
        yield row


def unet_rows(name: str, views: int, dtype: torch.dtype, repeats: int, compiled: bool, kernels: int) -> Iterator[Row]:
    """The guided pair of each view."""
    unet = build("unet", name, dtype, "cuda")
    config, weights = unet.config, sum(p.numel() * p.element_size() for p in unet.parameters()) / MB
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    n, size = 2 * views, config.sample_size
    x, t = draw(n, config.in_channels, size, size), torch.full((n,), 500, device="cuda")
    text = draw(n, TOKENS, config.encoder_hid_dim or config.cross_attention_dim)
    more: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":
        more["added_cond_kwargs"] = {"text_embeds": draw(n, 1280), "time_ids": draw(n, 6)}

    def plain(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return unet(x, t, text, return_dict=False, **more)[0]

    def as_it_is(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with torch.no_grad():
            return plain(x, t, text)

    def compile_unet() -> Callable[..., Tensor]:
        unet.to(memory_format=torch.channels_last)
        return CapturedFunction(torch.compile(plain, fullgraph=True))

    def fuse_unet() -> Callable[..., Tensor]:
        fuse(unet)
        return CapturedFunction(plain)

    variants: list[tuple[str, Callable[[], Callable[..., Tensor]]]] = [
        ("eager", lambda: as_it_is),
        ("graph", lambda: CapturedFunction(plain)),
    ]
    if compiled:
        variants.append(("compiled", compile_unet))
    variants.append(("fused", fuse_unet))  # last: it changes the module
    wanted: Tensor | None = None
    for variant, make in variants:
        row = Row("unet", name, variant, views, str(dtype).split(".")[1], weights_mb=weights)
        try:
            run = make()
            found = measure(row, lambda run=run: run(x, t, text), repeats)  # type: ignore[misc]
            if wanted is None:
                wanted = found.clone()
            row.error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
            if kernels:
                print_kernels(lambda run=run: run(x, t, text), kernels)  # type: ignore[misc]
        except torch.OutOfMemoryError as error:
            row.note = str(error).split(".")[0]
        run = found = None
        yield row


def main() -> int:
    """Measure, print the table, write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("vae", "unet"), default=["vae", "unet"])
    parser.add_argument("--models", nargs="+", choices=[*UNETS, *VAES], default=["sd", "sd-1.5", "sd-2.1"])
    parser.add_argument("--views", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--kernels", type=int, default=0, help="print so many of the longest kernels above each row")
    parser.add_argument("--out", action="store_true", help="write a JSON file to benchmarks/results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("large models are measured on a GPU, and there is none")
    dtype, about = getattr(torch, args.dtype), describe(torch.device("cuda"))
    print("device", headline(about))
    print(
        f"{'part':6}{'model':10}{'variant':20}{'views':>6}{'ms':>9}{'peak MiB':>9}{'reserved':>9}{'weights':>9}  error"
    )
    rows = []
    for model in args.models:
        for views in args.views:
            found = []
            if model in VAES and "vae" in args.parts:
                found.append(vae_rows(model, views, dtype, args.repeats, args.kernels))
            if model in UNETS and "unet" in args.parts:
                found.append(unet_rows(model, views, dtype, args.repeats, args.compile, args.kernels))
            for some in found:
                for row in some:
                    rows.append(row)
                    numbers = (row.ms, row.peak_mb, row.reserved_mb, row.weights_mb)
                    cells = "".join("        -" if x is None else f"{x:9.1f}" for x in numbers)
                    error = "" if row.error is None else f"{row.error:.1e}"
                    print(
                        f"{row.part:6}{row.model:10}{row.variant:20}{row.views:6}{cells}  {error} {row.note}",
                        flush=True,
                    )
                free_memory()
    if args.out:
        print("written:", write_result(RESULTS, "guidance", about, [asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
