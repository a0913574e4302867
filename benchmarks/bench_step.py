"""A whole training step under a large diffusion model: time stage by stage, and the most memory that a run takes.

The trainer is the real one, with the settings that `dreamfusion-fast generate` has for published models
(`Config.for_guidance`): a field of 16 levels to 2048, 2^19 rows. The model has random weights of the real architecture
(`architectures.py`), and prompts are embedded as random numbers, as text encoders are gone by then. With `--embed` they
are embedded by the model's text encoders, of random weights too, placed and freed as in a run. Per case:

- ms: wall time of a step, the mean over `--steps` steps without a wait between them, after half as many to warm up;
- ours: that, less the medians of encoding, U-Net and the encoding's backward, profiled in further steps; it means
  nothing where profiling slows the host down, as with weights in main memory;
- allocated, reserved: torch's peaks over the whole process, weights and warm-up included, in GB (10^9 bytes).

    python benchmarks/bench_step.py                              # sd-1.5 and sd-2.1 at 64^2
    python benchmarks/bench_step.py --models sd-2.1 --sizes 512 --shading lambertian --memory 8GB --profile
    python benchmarks/bench_step.py --modes sds csd sdi ism vsd  # the methods, with the settings of their authors
    python benchmarks/bench_step.py --models sdxl if-i-xl --out  # written to benchmarks/results
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch
from architectures import UNETS, RandomPrompts, RandomWeights
from machine import RESULTS, describe, headline, write_result

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig, PromptEmbeddings, PromptSet, ScoreDistillation
from dreamfusion_fast.guidance.distillation import METHODS
from dreamfusion_fast.guidance.models.pipelines import LatentModel, PipelineModel, PixelModel
from dreamfusion_fast.guidance.models.sdxl_pipeline import SDXLModel
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.memory_plan import capped
from dreamfusion_fast.training.profile import StepProfile, StepProfiler
from dreamfusion_fast.training.ranks import Ranks
from dreamfusion_fast.training.trainer import StepResult, Trainer

GUIDANCE_STAGES = ("encode", "unet", "encode backward")


@dataclass
class Row:
    """One case; None: not measured, `note` says why."""

    model: str
    size: int
    batch: int
    shading: str
    memory: str | None
    steps: int
    mode: str = "sds"
    ms: float | None = None
    ours_ms: float | None = None
    unet_ms: float | None = None
    encode_ms: float | None = None
    allocated_gb: float | None = None
    reserved_gb: float | None = None
    planned_gb: float | None = None
    text_encoders: bool = False
    embed_s: float | None = None
    embed_allocated_gb: float | None = None
    embed_reserved_gb: float | None = None
    samples: int | None = None
    plan: str = ""
    note: str = ""


class MeasuredPrompts(ScoreDistillation):
    """Score distillation that keeps the seconds of embedding its prompt, and torch's peaks until then in GB."""

    seconds = 0.0
    peaks = (0.0, 0.0)

    def embed(self, prompts: PromptSet | str) -> PromptEmbeddings:
        """As the real one. The seconds are those of making the random weights, too, in place of reading files."""
        start = time.perf_counter()
        embeddings = super().embed(prompts)
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - start
        self.peaks = (torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9)
        return embeddings


def model_of(name: str, device: torch.device) -> PipelineModel:
    """A model with random weights, not loaded yet."""
    config = GuidanceConfig(name="random/weights", cache=False)
    if name.startswith("if"):
        return PixelModel(RandomWeights(name, None), config, device)
    if name == "sdxl":
        return SDXLModel(RandomWeights(name, "sdxl"), config, device)
    return LatentModel(RandomWeights(name, "sd"), config, device)


def config_of(row: Row) -> Config:
    """A run of ten thousand steps at one size and one kind of shading; its grid is updated as in most of them."""
    textureless = float(row.shading == "textureless")
    large = Config.for_guidance("stable-diffusion")
    return replace(
        large,
        prompt="a benchmark",
        batch=row.batch,
        memory=row.memory,
        occupancy=replace(large.occupancy, warmup_steps=0),
        shading=replace(
            large.shading,
            albedo_steps=0.0,
            albedo_probability=float(row.shading == "albedo"),
            textureless_probability=textureless,
        ),
        schedule=replace(large.schedule, render_size_start=row.size, render_size=row.size),
    )


def make_trainer(row: Row, device: torch.device, ranks: Ranks | None = None) -> Trainer:
    """The run of a case, planned; `ranks`: the processes that share its views."""
    config = GuidanceConfig(name="random/weights", mode=row.mode, cache=False)  # type: ignore[arg-type]
    guidance_class = MeasuredPrompts if row.text_encoders else RandomPrompts
    return Trainer(config_of(row), device, guidance_class(model_of(row.model, device), config), ranks=ranks)


def time_steps(trainer: Trainer, warm_up: int, steps: int) -> tuple[float, StepResult]:
    """Milliseconds of a step, the mean without a wait between them, and the last one's result."""

    def wait() -> None:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)

    for _ in range(warm_up):
        trainer.step()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        result = trainer.step()
    wait()
    return (time.perf_counter() - start) / steps * 1e3, result


def fill(row: Row, device: torch.device) -> StepProfile | None:
    """Measure a case; the profile of its steps."""
    torch.cuda.reset_peak_memory_stats()
    profiler = StepProfiler(device)
    with capped(row.memory, device):
        trainer = make_trainer(row, device)
        if isinstance(trainer.guidance, MeasuredPrompts):
            row.embed_s = trainer.guidance.seconds
            row.embed_allocated_gb, row.embed_reserved_gb = trainer.guidance.peaks
        lines = trainer.planner.lines(trainer.plan)
        row.plan = " / ".join(lines)
        row.planned_gb = sum(trainer.planner.parts(trainer.plan).values()) / 1e9
        row.ms, result = time_steps(trainer, max(row.steps // 2, 12), row.steps)
        row.samples = int(result.samples)
        before = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()  # profiled steps reset them
        trainer.profiler = profiler
        for _ in range(min(2 * row.steps, 160)):
            trainer.step()
        torch.cuda.synchronize()
    row.allocated_gb = max(before[0], torch.cuda.max_memory_allocated()) / 1e9
    row.reserved_gb = max(before[1], torch.cuda.max_memory_reserved()) / 1e9
    profile = profiler.result()
    if profile is not None:
        times = {stage.name: stage.ms for stage in profile.stages}
        row.unet_ms = times.get("unet")
        row.encode_ms = times.get("encode", 0.0) + times.get("encode backward", 0.0)
        row.ours_ms = row.ms - sum(times.get(name, 0.0) for name in GUIDANCE_STAGES)
    return profile


def show(row: Row) -> str:
    """A line of the table."""
    numbers = (row.ms, row.ours_ms, row.unet_ms, row.encode_ms, row.allocated_gb, row.reserved_gb, row.planned_gb)
    cells = "".join("        -" if x is None else f"{x:9.2f}" for x in numbers)
    return (
        f"{row.model:9}{row.mode:5}{row.size:5}{row.batch:6} {row.shading:12}{row.memory or '-':>7}{cells}  {row.note}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(UNETS), default=["sd-1.5", "sd-2.1"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--shading", nargs="+", choices=("albedo", "lambertian", "textureless"), default=["albedo"])
    parser.add_argument("--modes", nargs="+", choices=[mode for mode in METHODS if mode != "rfds"], default=["sds"])
    parser.add_argument("--memory", help="such as 8GB: the run has to fit into it")
    parser.add_argument("--embed", action="store_true", help="embed the prompt by text encoders of random weights")
    parser.add_argument("--steps", type=int, default=160, help="a sixteenth of them update the occupancy grid")
    parser.add_argument("--profile", action="store_true", help="print the table of stages, too")
    parser.add_argument("--out", action="store_true", help="add the rows to a JSON file in benchmarks/results")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("large models are measured on a GPU, and there is none")
    device, about = torch.device("cuda", 0), describe(torch.device("cuda"))
    print("device", headline(about))
    names = ("ms", "ours", "U-Net", "encode", "alloc GB", "resv GB", "planned")
    print(
        f"{'model':9}{'mode':5}{'size':>5}{'batch':>6} {'shading':12}{'memory':>7}", *(f"{name:>8}" for name in names)
    )
    rows = []
    for model, mode, size, shading in product(args.models, args.modes, args.sizes, args.shading):
        row = Row(model, size, args.batch, shading, args.memory, args.steps, mode, text_encoders=args.embed)
        profile = None
        try:
            profile = fill(row, device)
        except (UserError, torch.OutOfMemoryError) as error:
            row.note = " ".join(str(error).split())[:200]
        rows.append(row)
        print(show(row), flush=True)
        print("   ", row.plan)
        if row.embed_s is not None:
            print(
                f"    prompt embedded in {row.embed_s:.1f} s, up to {row.embed_allocated_gb:.2f} GB allocated, "
                f"{row.embed_reserved_gb:.2f} GB reserved"
            )
        if args.profile and profile is not None:
            print(profile.table())
        gc.collect()
        torch.cuda.empty_cache()
    if args.out:
        print("written:", write_result(RESULTS, "step", about, [asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
