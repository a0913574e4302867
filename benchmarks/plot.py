"""The pictures of docs/performance.md: memory against image size, and time against samples, beside the peers' figures.

    pip install ".[bench]"
    python benchmarks/plot.py                                   # the H100's results, into docs/images
    python benchmarks/plot.py benchmarks/results/render-x.json --out out

Reads what `bench_render.py --out` wrote and `results/peers-h100.json`. Memory is torch's peak above the parameters,
for ours with the parameters' gradients included.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import RESULTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

IMAGES = Path(__file__).parents[1] / "docs" / "images"
OURS = "dreamfusion_fast"
COLORS = {
    OURS: "#c0392b",
    "nerfacc": "#34699a",
    "stable-dreamfusion": "#5b8c5a",
    "nerfacc + tiny-cuda-nn": "#8a6fa8",
    "nerfacc + tiny-cuda-nn encoding": "#b0762c",
    "PyTorch": "#8c8c8c",
}
LABELS = {"nerfacc + tiny-cuda-nn": "nerfacc + tcnn", "nerfacc + tiny-cuda-nn encoding": "nerfacc + tcnn enc."}
PANELS = {"albedo": "without normals", "lambertian": "with normals, Lambertian"}
CARD_GB = 16

Lines = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Figures:
    """Rows of ours and of the peers in one form, and where each were measured."""

    rows: list[dict[str, Any]]
    ours_on: str
    peers_on: str


def load(results: Sequence[Path]) -> Figures:
    """Native rows of the results, and the peers' figures."""
    rows, devices = [], []
    for path in results:
        result = json.loads(path.read_text())
        devices.append(result["device"])
        rows += [
            {**row, "peer": OURS, "peak_mb": row["peak_with_gradients_mb"]}
            for row in result["rows"]
            if row["backend"] == "native" and not row["failed"]
        ]
    if not rows:
        names = ", ".join(str(path) for path in results) or "no file"
        raise SystemExit(f"plot.py: no native rows in {names}; run benchmarks/run.py first")
    peers = json.loads((RESULTS / "peers-h100.json").read_text())
    return Figures(rows + peers["rows"], ", ".join(dict.fromkeys(devices)), peers["device"])


def series(rows: Iterable[dict[str, Any]], x: str, y: str) -> Lines:
    """Points (x, y) of each renderer, by x; only the rows that have both."""
    points: Lines = {}
    for row in rows:
        if row[x] is not None and row[y] is not None:
            points.setdefault(row["peer"], []).append((row[x], row[y]))
    return {peer: sorted(values) for peer, values in points.items()}


def draw(axes: Axes, lines: Lines, hollow: bool = False) -> None:
    """The lines, ours on top and heavier; hollow: thin dashes between hollow points."""
    for peer, points in lines.items():
        ours = peer == OURS
        axes.plot(
            *zip(*points, strict=True),
            color=COLORS[peer],
            marker="o",
            markersize=5 if ours else 4,
            markerfacecolor="white" if hollow else COLORS[peer],
            linewidth=0.8 if hollow else 2.2 if ours else 1.3,
            linestyle=(0, (4, 3)) if hollow else "-",
            zorder=3 if ours else 2,
        )


def name(axes: Axes, lines: Lines) -> None:
    """Each line's name in its colour at the right edge, level with its last point or as near as there is room."""
    right, (low, high) = axes.get_xlim()[1], axes.get_ylim()
    ends = sorted((points[-1] for points in lines.values()), key=lambda end: end[1])
    peers = sorted(lines, key=lambda peer: lines[peer][-1][1])
    heights = spread([math.log(y / low) / math.log(high / low) for _, y in ends])
    for peer, (x, y), height in zip(peers, ends, heights, strict=True):
        level = low * (high / low) ** height
        axes.plot([x, right], [y, level], color=COLORS[peer], linewidth=0.6, alpha=0.5, zorder=1)
        axes.annotate(
            LABELS.get(peer, peer),
            (right, level),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=COLORS[peer],
            fontsize=9,
            fontweight="bold" if peer == OURS else "normal",
            annotation_clip=False,
        )


def spread(heights: list[float], least: float = 0.06) -> list[float]:
    """Ascending heights moved apart to at least `least`, each cluster about its own middle."""
    clusters: list[list[float]] = []
    for height in heights:
        clusters.append([height])
        while len(clusters) > 1 and _bottom(clusters[-1], least) < _top(clusters[-2], least) + least:
            last = clusters.pop()
            clusters[-1] += last
    return [_bottom(cluster, least) + least * i for cluster in clusters for i in range(len(cluster))]


def _bottom(cluster: list[float], least: float) -> float:
    return sum(cluster) / len(cluster) - least * (len(cluster) - 1) / 2


def _top(cluster: list[float], least: float) -> float:
    return _bottom(cluster, least) + least * (len(cluster) - 1)


def frame(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def panels(figures: Figures, y_label: str, caption: str) -> tuple[Figure, dict[str, Axes]]:
    """Two panels on the same log axes, without and with normals; below, the caption and where it was measured."""
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    both = dict(zip(PANELS, figure.subplots(1, len(PANELS), sharex=True, sharey=True), strict=True))
    for shading, axes in both.items():
        axes.set_xscale("log")
        axes.set_yscale("log")
        frame(axes, PANELS[shading])
    next(iter(both.values())).set_ylabel(y_label, fontsize=9)
    h100 = figures.ours_on.startswith("NVIDIA H100")
    where = figures.ours_on if h100 else f"{OURS}: {figures.ours_on}; the others: {figures.peers_on}"
    figure.supxlabel(f"{caption}; {where}", fontsize=8, color="#666666")
    return figure, both


def settle(both: dict[str, Axes]) -> None:
    """Fix the limits at what is drawn so far. To ask for them makes the scaling that is due."""
    limits = [(axes.get_xlim(), axes.get_ylim()) for axes in both.values()]
    for axes, (x, y) in zip(both.values(), limits, strict=True):
        axes.set(xlim=x, ylim=y)


def memory_picture(figures: Figures) -> Figure:
    """Peak memory against image side; the small ball's lines full, the large one's dashed."""
    figure, both = panels(
        figures,
        "peak memory above the parameters",
        "forward + backward; filled: ball of radius 0.5 in a box from -1 to 1, hollow: radius 1",
    )
    for shading, axes in both.items():
        for radius, hollow in ((0.5, False), (1.0, True)):
            rows = [row for row in figures.rows if row["shading"] == shading and row["radius"] == radius]
            draw(axes, series(rows, "size", "peak_mb"), hollow)
        axes.set_xlabel("image side, pixels", fontsize=9)
        axes.xaxis.set_major_locator(FixedLocator([64, 128, 256, 512, 1024]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
        axes.axhline(1000 * CARD_GB, color="#444444", linewidth=0.8, zorder=1)
        axes.annotate(
            f"a {CARD_GB} GB card",
            (0.01, 1000 * CARD_GB),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
            color="#444444",
        )
    settle(both)
    for shading, axes in both.items():
        rows = [row for row in figures.rows if row["shading"] == shading and row["radius"] == 0.5]
        name(axes, series(rows, "size", "peak_mb"))
    return figure


def time_picture(figures: Figures) -> Figure:
    """Time of a full step against samples, as far as the peers go."""
    figure, both = panels(figures, "time, ms", "forward + backward, hash grid 16 x 2, MLP 32-64-64-4")
    most = 1.1 * max(row["samples"] for row in figures.rows if row["peer"] != OURS)
    lines = {
        shading: series(
            [row for row in figures.rows if row["shading"] == shading and row["samples"] <= most], "samples", "full_ms"
        )
        for shading in PANELS
    }
    for shading, axes in both.items():
        draw(axes, lines[shading])
        axes.set_xlabel("samples", fontsize=9)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    settle(both)
    for shading, axes in both.items():
        name(axes, lines[shading])
    return figure


def _bytes(mb: float) -> str:
    return f"{mb / 1000:g} GB" if mb >= 1000 else f"{mb:g} MB"


def _count(value: float) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw memory.png and time.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="default: benchmarks/results/render-nvidia-h100*.json")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures (docs/images)")
    args = parser.parse_args(arguments)
    figures = load(args.results or sorted(RESULTS.glob("render-nvidia-h100*.json")))
    args.out.mkdir(parents=True, exist_ok=True)
    memory_picture(figures).savefig(args.out / "memory.png", dpi=150)
    time_picture(figures).savefig(args.out / "time.png", dpi=150)


if __name__ == "__main__":
    main()
