"""The benchmarks measure the workload they claim, and write down all that a figure needs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_contention
import bench_mesh
import bench_nerfacc
import bench_render
import machine
import measure
import workload
from fakes import BallGuidance, small_config

import dreamfusion_fast
from dreamfusion_fast.training.generator import Generator

BENCHMARKS = Path(bench_render.__file__).parent
CPU = torch.device("cpu")
MACHINE = {"device", "torch", "cuda", "triton", "dreamfusion_fast", "commit", "date", "threads", "python"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of a few small rows, on the CPU."""
    folder = tmp_path_factory.mktemp("results")
    options = ["--sizes", "9", "--shading", "albedo", "lambertian", "--repeats", "1", "--device", "cpu"]
    assert bench_render.main([*options, "--backends", "native", "nerfacc", "--out", str(folder)]) == 0
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize(("size", "radius", "samples"), [(64, 0.5, 62_600), (64, 1.0, 598_000)])
def test_sample_counts_are_those_of_the_peers(size: int, radius: float, samples: int) -> None:
    assert workload.march_scene(size, radius, CPU).t.shape[0] == pytest.approx(samples, rel=0.01)


def test_the_issue_set_has_a_row_for_every_figure_of_the_peers() -> None:
    ours = {(case.size, case.radius, case.shading) for case in bench_render.issue_set() if case.backend == "native"}
    peers = json.loads((BENCHMARKS / "results" / "peers-h100.json").read_text())
    assert {(row["size"], row["radius"], row["shading"]) for row in peers["rows"]} <= ours
    assert {row["peer"] for row in peers["rows"]} == set(peers["peers"])


def test_result_has_the_machine_and_the_figures(result: Path) -> None:
    written = json.loads(result.read_text())
    assert result.name == f"render-{machine.slug(written['device'])}.json"
    assert set(written) >= MACHINE
    # nerfacc marches on a GPU only, so it has no rows here, whether it is installed or not.
    assert [(row["backend"], row["shading"]) for row in written["rows"]] == [
        ("native", "albedo"),
        ("native", "lambertian"),
    ]
    for row in written["rows"]:
        assert row["samples"] == pytest.approx(81 * 62_600 / 64**2, rel=0.1)
        assert row["full_ms"] == pytest.approx(row["forward_ms"] + row["backward_ms"], rel=0.01)
        assert not row["failed"]


def test_what_fails_becomes_a_row_and_an_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(bench_render, "fill", fail)
    options = ["--sizes", "9", "--backends", "native", "--device", "cpu", "--out", str(tmp_path)]
    assert bench_render.main(options) == 1
    (path,) = tmp_path.iterdir()
    (row,) = json.loads(path.read_text())["rows"]
    assert row["failed"]
    assert row["note"] == "RuntimeError: no room"
    assert row["full_ms"] is None


def test_adam_moves_nothing_and_its_moments_are_no_part_of_a_step() -> None:
    scene = workload.make_scene(9, 0.5, "albedo", CPU)
    step = bench_render.Step(bench_render.backends.build("native", scene, "float32", None), scene.image_gradient, True)
    before = [parameter.detach().clone() for parameter in step.parameters]
    step(0)
    for old, parameter in zip(before, step.parameters, strict=True):
        assert torch.equal(old, parameter)
    assert step.gradient_mb() == pytest.approx(sum(p.numel() for p in step.parameters) * 4 / 2**20)


def test_commit_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMFUSION_FAST_COMMIT", "0123abc")
    assert machine.describe(CPU)["commit"] == "0123abc"


@pytest.mark.gpu
def test_memory_counts_what_torch_allocates() -> None:
    memory = measure.Memory(torch.device("cuda"))
    held = torch.empty(3 * 2**20, dtype=torch.uint8, device="cuda")
    more = torch.empty(5 * 2**20, dtype=torch.uint8, device="cuda")
    del more
    assert memory.now() == pytest.approx(3)
    assert memory.peak() == pytest.approx(8)
    memory.restart()
    assert memory.peak() == pytest.approx(3)
    assert held.shape == (3 * 2**20,)


@pytest.mark.gpu
@pytest.mark.parametrize("same_each_time", [True, False])
def test_a_captured_step_is_believed_only_with_the_same_gradients(same_each_time: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(1023, device="cuda"))
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        weight.grad = None
        (weight * (2 if same_each_time else calls)).sum().backward()

    milliseconds, note = measure.captured_ms(step, [weight], torch.device("cuda"), 3)
    if same_each_time:
        assert note == ""
        assert milliseconds is not None
        assert milliseconds > 0
    else:
        assert milliseconds is None
        assert "gradients" in note


@pytest.mark.gpu
def test_rows_of_a_gpu_have_memory_and_a_graph_or_a_reason(tmp_path: Path) -> None:
    options = ["--device", "cuda", "--sizes", "33", "--backends", "native", "--captured", "33", "--out", str(tmp_path)]
    assert bench_render.main(options) == 0
    (path,) = tmp_path.iterdir()
    (row,) = json.loads(path.read_text())["rows"]
    assert 0 < row["held_mb"] <= row["peak_with_gradients_mb"]
    assert 0 < row["peak_mb"] <= row["peak_with_gradients_mb"]
    assert row["held_bytes_per_sample"] == pytest.approx(row["held_mb"] * 2**20 / row["samples"], rel=1e-3)
    assert (row["captured_ms"] is None) == bool(row["note"])


@pytest.mark.slow
def test_contention_has_idle_and_busy_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "render", "--waiting", "package first", "spinning", "--size", "9", "--turns", "1"]
    assert bench_contention.main([*options, "--repeats", "2", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    written = json.loads(path.read_text())
    assert set(written) >= MACHINE
    assert [(row["step"], row["waiting"]) for row in written["rows"]] == [
        ("render", "package first"),
        ("render", "spinning"),
    ]
    for row in written["rows"]:
        assert row["ratio"] == pytest.approx(row["busy_ms"] / row["idle_ms"], rel=1e-3)
        assert row["repeats"] == 2
    assert written["rows"][1]["lost"] == 0
    assert "package first" in capsys.readouterr().out


@pytest.mark.slow
def test_op_benchmarks_write_native_and_twin(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "bench_ops.py"), "-q", "--benchmark-quiet"]
    options = ["--device", "cpu", "--sizes", "9", "-k", "composite and forward and not alpha", "--out", str(tmp_path)]
    # The package under test, installed or not; times are measured by one process, however many run these tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(Path(dreamfusion_fast.__file__).parents[1])
    run = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = tmp_path.iterdir()
    written = json.loads(path.read_text())
    assert set(written) >= MACHINE
    assert [(row["group"], row["provider"]) for row in written["rows"]] == [
        ("composite forward 9^2", "native"),
        ("composite forward 9^2", "twin"),
    ]
    assert all(row["median_ms"] > 0 for row in written["rows"])


def test_pictures_are_drawn(result: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("needs matplotlib, of the bench extra")
    import plot

    plot.main([str(result), "--out", str(tmp_path)])
    for name in ("memory.png", "time.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("heights", [[0.1], [0.1, 0.11, 0.5], [0.2, 0.2, 0.2, 0.21], [0.1, 0.17, 0.18, 0.19]])
def test_names_in_a_picture_keep_their_distance_and_order(heights: list[float]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("needs matplotlib, of the bench extra")
    import plot

    placed = plot.spread(heights, least=0.06)
    assert all(b - a >= 0.06 - 1e-12 for a, b in pairwise(placed))
    assert sum(placed) == pytest.approx(sum(heights))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which one prompt has a run."""

    class Small(Generator):
        def __init__(self, prompt: str, **settings: object) -> None:
            super().__init__(small_config(prompt=prompt), guidance=BallGuidance(), **settings)

    monkeypatch.setattr(bench_mesh, "Generator", Small)
    assert bench_mesh.main([str(tmp_path / "runs"), "--prompts", "a ball", "--generate", "--device", "cpu"]) == 0
    return tmp_path / "runs"


@pytest.mark.slow
def test_agreement_is_measured_again_and_written_down(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    options = ["--prompts", "a ball", "--device", "cpu", "--out", str(runs / "results")]
    assert bench_mesh.main([str(runs), *options]) == 0
    written = json.loads(next((runs / "results").iterdir()).read_text())
    assert set(written) >= MACHINE
    (row,) = written["rows"]
    assert (row["prompt"], row["batch"]) == ("a ball", 2)
    assert row["iou"] > 0.9
    assert f"{row['iou']:6.3f} {row['covered']:8.3f}" in capsys.readouterr().out


def test_a_prompt_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_mesh.main([str(tmp_path), "--prompts", "a ball", "a cube", "--device", "cpu"]) == 1
    assert "has no run of a ball, a cube; --generate makes them" in capsys.readouterr().err


def test_the_prompts_are_24_and_those_of_the_record() -> None:
    record = json.loads((BENCHMARKS / "results" / "mesh-nvidia-h200.json").read_text())
    assert [row["prompt"] for row in record["rows"]] == list(bench_mesh.PROMPTS)
    assert len(set(bench_mesh.PROMPTS)) == 24


def test_a_step_through_the_names_of_nerfacc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sizes", "9", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert bench_nerfacc.main(options) == 0
    written = json.loads(next(tmp_path.iterdir()).read_text())
    assert set(written) >= MACHINE
    (row,) = written["rows"]
    assert row["module"] == "drop-in"
    assert row["samples"] > 1000
    assert all(row[part] > 0 for part in ("sampling", "forward", "backward", "step", "update"))
    assert "nerfacc has no rows" in capsys.readouterr().out
