"""Render the catalogue into the folder that the prior is trained from: ``python -m prior_data.build --help``."""

import argparse
import json
import os
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from .captions import describe, is_dropped, split_and_weight
from .catalogue import Entry, read_catalogue, unpack
from .colours import dominant
from .render import MINIMUM_DISTANCE, Renderer, Scene, fill
from .views import encode, load_views, to_sheet

MEASURED = ("colours", "mean_rgb", "coverage")
_renderer: Renderer | None = None


def sample_views(key: str, count: int) -> np.ndarray:
    """Random (azimuth, elevation, distance) [count, 3] in radians; the same key gives the same views."""
    generator = np.random.default_rng(zlib.crc32(key.encode()))
    azimuth = generator.uniform(0, 2 * np.pi, count)
    elevation = generator.triangular(-12, 20, 62, count)
    overhead = generator.permutation(count) < count // 8
    elevation[overhead] = generator.uniform(60, 89, overhead.sum())
    distance = MINIMUM_DISTANCE * generator.uniform(1, 1.15, count)
    return np.stack([azimuth, np.deg2rad(elevation), distance], -1)


def render_model(job: tuple[Entry, int]) -> dict | None:
    """Sheets, views and measured colours of one model; None when it shows next to nothing."""
    global _renderer
    entry, count = job
    _renderer = _renderer or Renderer()
    scene = Scene(_renderer, entry)
    poses = sample_views(entry.key, count)
    rendered = [scene.view(*pose) for pose in poses]
    scene.release()
    albedo = np.stack([view[0] for view in rendered])
    alpha = albedo[..., 3]
    if alpha.mean() < 0.008:
        return None
    colours = dominant(albedo[..., :3], alpha)
    mean_rgb = (albedo[..., :3] * alpha[..., None]).sum((0, 1, 2)) / alpha.sum()
    normals = np.stack([fill(normal, a > 0.3) for (_, normal), a in zip(rendered, alpha, strict=True)])
    hues = np.stack([fill(image[..., :3], a > 0.1) for image, a in zip(albedo, alpha, strict=True)])
    pictures = np.round(np.concatenate([hues, alpha[..., None]], -1) * 255).astype(np.uint8)
    directions = np.round((normals * 0.5 + 0.5) * 255).astype(np.uint8)
    return {
        "albedo": encode(to_sheet(pictures), quality=84),
        "normal": encode(to_sheet(directions), quality=70),
        "poses": poses,
        "colours": colours,
        "mean_rgb": [round(float(c), 3) for c in mean_rgb],
        "coverage": round(float(alpha.mean()), 3),
    }


def write(folder: Path, entries: list[Entry], results: list[dict]) -> None:
    """Write albedo.bin, normal.bin, views.npz and models.json."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = {}
    for kind in ("albedo", "normal"):
        (folder / f"{kind}.bin").write_bytes(b"".join(result[kind] for result in results))
        ends[f"{kind}_ends"] = np.cumsum([len(result[kind]) for result in results])
    counts = np.array([len(result["poses"]) for result in results], np.int32)
    poses = np.concatenate([result["poses"] for result in results]).astype(np.float32)
    np.savez(
        folder / "views.npz",
        counts=counts,
        model=np.repeat(np.arange(len(results), dtype=np.int32), counts),
        azimuth=poses[:, 0],
        elevation=poses[:, 1],
        distance=poses[:, 2],
        **ends,
    )
    write_models(folder, entries, results)


def write_models(folder: Path, entries: list[Entry], results: list[dict]) -> None:
    """Write models.json from the catalogue, the name tables and the measured colours."""
    models = [describe(e) | {name: r[name] for name in MEASURED} for e, r in zip(entries, results, strict=True)]
    split_and_weight(models)
    (folder / "models.json").write_text(json.dumps(models, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, required=True, help="sweethome3d-furniture_*.deb")
    parser.add_argument("--work", type=Path, required=True, help="where to unpack it (0.5 GB)")
    parser.add_argument("--out", type=Path, required=True, help="the data folder to write")
    parser.add_argument("--views", type=int, default=72, help="views per model")
    parser.add_argument("--only", nargs="*", help="catalogue names to keep (default: all)")
    parser.add_argument(
        "--names-only", action="store_true", help="write models.json again (names, colours), keep the pictures"
    )
    parser.add_argument("--every", type=int, default=1, help="keep every n-th model, for a trial")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    entries = [e for e in read_catalogue(unpack(options.package, options.work)) if not is_dropped(e)]
    if options.names_only:
        previous = json.loads((options.out / "models.json").read_text(encoding="utf-8"))
        by_key = {entry.key: entry for entry in entries}
        albedo, _, views = load_views(options.out, options.workers)
        for number, model in enumerate(previous):
            pixels = albedo[views["model"] == number].astype(np.float32) / 255
            model["colours"] = dominant(pixels[..., :3], pixels[..., 3])
        write_models(options.out, [by_key[model["key"]] for model in previous], previous)
        return
    if options.only:
        entries = [entry for entry in entries if entry.name in options.only]
    entries = entries[:: options.every]
    begin, results, kept = time.perf_counter(), [], []
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = ((entry, options.views) for entry in entries)
        for number, (entry, result) in enumerate(zip(entries, pool.map(render_model, jobs), strict=True)):
            if result is None:
                print(f"blank, dropped: {entry.key} {entry.name}")
                continue
            kept.append(entry)
            results.append(result)
            if number % 50 == 0:
                print(f"{number}/{len(entries)} {time.perf_counter() - begin:.0f} s", flush=True)
    write(options.out, kept, results)
    size = sum(path.stat().st_size for path in options.out.iterdir()) / 1e6
    print(f"{len(kept)} models, {sum(len(r['poses']) for r in results)} views, {size:.1f} MB")


if __name__ == "__main__":
    main()
