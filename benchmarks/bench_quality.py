"""How good are the objects: forty prompts by two seeds, seen from around by two judges. See docs/quality.md.

    python benchmarks/bench_quality.py run --out out/quality --gpus-per-run 0.25
    python benchmarks/bench_quality.py clip prompt_single.txt --out out/t3bench
    python benchmarks/bench_quality.py real --package sweethome3d-furniture_1.8-1_all.deb --work out/catalogue

`run` makes the objects by `dreamfusion-fast batch`, draws their meshes, asks the judges and writes result.json,
result.md and sheet.jpg into --out. The same command again goes on where it was cut. With --record the result and the
sheet go to benchmarks/results, too, and a line to quality-history.csv. What it does not know are options of `generate`,
for all runs.

`clip` does the same for any list of prompts, a line each, with CLIP as the judge. `real` makes what `run` compares
with: the scores of the catalogue's models, and the classifier of views.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import RESULTS, describe, headline, slug
from PIL import Image
from quality import pictures, real, report, scoring
from quality.clip import ClipJudge, clip_scores
from quality.faces import FrontFinder, has_front, train
from quality.judges import JUDGES, Judge
from quality.pictures import Layers, lit
from quality.prompts import PROMPTS, SEEDS
from quality.shape import relief, thickness

from dreamfusion_fast.export import export_field
from dreamfusion_fast.io import write_text
from dreamfusion_fast.training.generator import Generator
from dreamfusion_fast.training.scenes import make_scene

REAL = Path(real.__file__).with_name("real.json")
MODELS_PER_PROMPT = 4
PLANTS = re.compile(
    r"tree|plant|bush|hedge|fern|flower|cactus|bamboo|bonsai|palm"
)  # other on each side, without a front
_EXPORT = {"turntable_frames": 0, "preview_views": 4}


def make(runs: Path, rows: Sequence[dict[str, Any]], gpus_per_run: str | None, options: Sequence[str]) -> int:
    """Make the objects of a batch's rows, or go on with it; the exit code of the batch."""
    runs.mkdir(parents=True, exist_ok=True)
    file = runs.with_suffix(".yaml")
    write_text(file, yaml.safe_dump([{**row, "export": {**_EXPORT}} for row in rows], sort_keys=False))
    command = [sys.executable, "-m", "dreamfusion_fast.cli", "batch", str(file), "--out", str(runs)]
    share = [] if gpus_per_run is None else ["--gpus-per-run", gpus_per_run]
    return subprocess.run([*command, *share, *options]).returncode


def draw(meshes: Sequence[Path], size: int) -> None:
    """Draw all meshes that are not drawn yet, in as many processes as there are cores."""
    workers = min(len(meshes), os.cpu_count() or 1, 16)
    if workers == 1:
        for mesh in meshes:
            scoring.seen_from_around(mesh, size)
        return
    # Not by fork: threads of torch and of CUDA do not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        for done, _ in enumerate(pool.map(scoring.seen_from_around, meshes, [size] * len(meshes)), 1):
            print(f"\rdrawn {done}/{len(meshes)}", end="", flush=True)
    print()


def untrained(run: Path, out: Path) -> Path:
    """The mesh of a run's field before its first step."""
    mesh = out / "mesh.glb"
    if not mesh.is_file():
        generator = Generator.resume(run)
        config = generator.config
        scene = make_scene(config, generator.device, torch.Generator().manual_seed(config.seed))
        scene.occupancy.update(scene.field, 0)
        out.mkdir(parents=True, exist_ok=True)
        export_field(scene.field, scene.field.aabb, mesh, resolution=64, texture_size=256, renderer=scene.renderer)
    return mesh


def run(args: argparse.Namespace, options: Sequence[str]) -> int:
    """Make, draw, judge, report."""
    out, device = args.out, torch.device(args.device)
    prompts, seeds = PROMPTS[:: args.every], SEEDS[: args.seeds]
    finder, judges = FrontFinder.load(), [Judge(name, device) for name in JUDGES]
    rows = [{"prompt": p.text, "seed": seed, "name": p.name(seed)} for p in prompts for seed in seeds]
    code = make(out / "runs", rows, args.gpus_per_run, options)
    if code not in (0, 1):  # refused before anything was made, or interrupted
        return code
    folders = {p.text: [out / "runs" / p.name(seed) for seed in seeds] for p in prompts}
    there = {text: [f for f in each if (f / "mesh.glb").is_file()] for text, each in folders.items()}
    meshes = [folder / "mesh.glb" for each in there.values() for folder in each]
    if not meshes:
        raise SystemExit("no object came out")
    blob = untrained(meshes[0].parent, out / "untrained")
    draw([*meshes, blob], args.size)
    scores: dict[str, list[dict[str, Any]]] = {}
    for prompt in prompts:
        scores[prompt.text] = [
            scoring.score_run(folder, judges, finder, prompt, prompts) for folder in there[prompt.text]
        ]
        print(f"{prompt.text}: {len(scores[prompt.text])} scored", flush=True)
    field = lit(scoring.read_layers(blob.with_name(scoring.LAYERS))[0], "colour")
    whole = len(meshes) == len(PROMPTS) * len(SEEDS) and args.size == pictures.SIZE
    result: dict[str, Any] = {
        "suite": "quality",
        **describe(device),
        "label": args.label,
        "options": " ".join(options),
        "runs": len(meshes),
        "missing": [folder.name for text, each in folders.items() for folder in each if folder not in there[text]],
        "objects": report.summary(scores, prompts),
        "controls": report.control_scores(judges, prompts, {"untrained field": field}),
        "real": {**json.loads(REAL.read_text(encoding="utf-8"))["objects"], **finder.ceiling()},
        "view_classifier": finder.trust,
        "rows": report.by_prompt(scores, prompts),
    }
    text = f"{headline(describe(device))}\n\n{len(meshes)} objects.\n\n{report.table(result)}"
    page = report.sheet(folders)
    save(out, "result", result, text, page, "sheet")
    print(text)
    if args.record:
        if not whole:
            raise SystemExit("--record: not all objects are there, or not at full size")
        name = f"quality-{slug(args.label)}-{slug(str(result['device']))}"
        save(RESULTS, name, result, text, page, name)
        report.remember(RESULTS / "quality-history.csv", result)
    return code


def save(folder: Path, name: str, result: dict[str, Any], text: str, page: Image.Image, picture: str) -> None:
    """Write a result as JSON and Markdown, and its sheet."""
    write_text(folder / f"{name}.json", json.dumps(rounded(result), indent=1) + "\n")
    write_text(folder / f"{name}.md", text)
    page.save(folder / f"{picture}.jpg", quality=80)


def rounded(value: Any) -> Any:
    """Floats to five digits: more is noise."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def clip(args: argparse.Namespace, options: Sequence[str]) -> int:
    """Make the objects of a list, draw them, ask CLIP, report."""
    lines = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    names = {text: f"{number:04}" for number, text in enumerate(dict.fromkeys(filter(None, lines)))}
    names = dict(list(names.items())[:: args.every])
    judge = ClipJudge.load(args.model, args.weights, args.device)
    rows = [{"prompt": text, "seed": 0, "name": name} for text, name in names.items()]
    code = make(args.out / "runs", rows, args.gpus_per_run, options)
    if code not in (0, 1):
        return code
    meshes = {text: args.out / "runs" / name / "mesh.glb" for text, name in names.items()}
    meshes = {text: mesh for text, mesh in meshes.items() if mesh.is_file()}
    if not meshes:
        raise SystemExit("no object came out")
    draw(list(meshes.values()), args.size)
    views = {text: lit(scoring.read_layers(m.with_name(scoring.LAYERS))[0], "colour") for text, m in meshes.items()}
    result = clip_scores(judge, views, pictures.controls(args.size))
    about = {
        "suite": "quality-clip",
        **describe(torch.device(args.device)),
        "model": args.model,
        "weights": args.weights,
    }
    write_text(args.out / "result.json", json.dumps(rounded({**about, **result}), indent=1) + "\n")
    for name in ("similarity", "permuted", "first"):
        print(f"{name:12}{result[name]['mean']:7.3f}  {result[name]['low']:.3f} to {result[name]['high']:.3f}")
    for name, value in result["controls"].items():
        print(f"{name:12}{value:7.3f}")
    return code


def learn_views(models: real.Models, work: Path, epochs: int) -> FrontFinder:
    """Train the classifier of views on the catalogue's models, and store it."""
    values, _ = real.small_views(models, work / "small-views")
    views: dict[str, Layers] = {}
    for (entry, noun), packed in zip(models, values, strict=True):
        layers = real.unpacked(packed)
        if has_front(layers) and not PLANTS.search(noun):
            views[entry.key] = layers
    print(f"{len(views)} of {len(models)} models have a front", flush=True)
    finder = train(views, epochs)
    print(f"view classifier: {finder.trust}, threshold {finder.threshold:.3f}", flush=True)
    finder.save()
    return finder


def measure_real(models: real.Models, size: int) -> dict[str, Any]:
    """The judges' scores of the catalogue's models of each prompt: the ceiling."""
    judges, scores = [Judge(name) for name in JUDGES], {}
    for prompt in PROMPTS:
        own = [entry for entry, noun in models if noun in prompt.nouns]
        own = own[:: -(-len(own) // MODELS_PER_PROMPT)]
        scores[prompt.text] = []
        for entry in own:
            large = real.of_model(entry, pictures.VIEWS, size)
            said = scoring.judged(judges, lambda mode, seen=large: lit(seen, mode), prompt, PROMPTS)
            shape = {"thickness": thickness(large), "relief": relief(large)}
            scores[prompt.text].append({"judges": said, "shape": shape, "faces": None})
        named = [score["judges"]["lite0 colour"]["top5"] for score in scores[prompt.text]]
        print(f"{prompt.text}: {len(named)} models, {sum(named):.0f} named", flush=True)
    return {"objects": report.summary(scores, PROMPTS), "rows": report.by_prompt(scores, PROMPTS)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "clip"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True, help="folder of the runs and of the result")
        command.add_argument("--gpus-per-run", help="of the batch: 0.25 for four runs on each GPU")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the judges")
        command.add_argument("--every", type=int, default=1, help="each n-th prompt only, for a trial")
        command.add_argument("--size", type=int, default=pictures.SIZE, help="pixels of a view, for a trial")
        if name == "run":
            command.add_argument("--seeds", type=int, default=len(SEEDS), help="the first so many, for a trial")
            command.add_argument("--label", default="defaults", help="what is measured, in a word")
            command.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
        else:
            command.add_argument("prompts", type=Path, help="a prompt per line")
            command.add_argument("--model", default="ViT-B-32", help="open_clip's name")
            command.add_argument("--weights", default="openai", help="open_clip's name, or a file")
    command = commands.add_parser("real")
    command.add_argument("--package", type=Path, required=True, help="sweethome3d-furniture_*.deb")
    command.add_argument("--work", type=Path, required=True, help="where it is unpacked (0.5 GB), and views are kept")
    command.add_argument("--epochs", type=int, default=40, help="of the classifier of views")
    args, options = parser.parse_known_args(arguments)
    if args.command == "real":
        models = real.catalogue(args.package, args.work)
        learn_views(models, args.work, args.epochs)
        write_text(REAL, json.dumps(rounded(measure_real(models, pictures.SIZE)), indent=1) + "\n")
        return 0
    return run(args, options) if args.command == "run" else clip(args, options)


if __name__ == "__main__":
    sys.exit(main())
