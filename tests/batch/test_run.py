"""Batches on a real Ray of two workers: as single runs, whatever fails and whoever is killed."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fakes
import guides
import pytest
from fakes import BallGuidance, small_config

from dreamfusion_fast.batch.config import BatchConfig
from dreamfusion_fast.batch.jobs import Job, read_jobs
from dreamfusion_fast.batch.outcome import read_outcome
from dreamfusion_fast.batch.run import run_batch
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.training.checkpoint import load_checkpoint
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.generator import Generator

ray = pytest.importorskip("ray")


def base(preset: str | None, guidance: str | None) -> Config:
    config = small_config(prompt="")
    return dataclasses.replace(config, log=dataclasses.replace(config.log, checkpoint_every=2))


def jobs_of(folder: Path, text: str) -> list[Job]:
    file = folder / "prompts.yaml"
    file.write_text(text)
    return read_jobs(file, folder / "runs", base)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One node with two cores, as a cluster that is there: starting one takes seconds, which are spent once."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        folders = [str(Path(__file__).parent), str(Path(fakes.__file__).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))  # of the workers
        # Where workers look for modules first: a source tree there would hide an installed package.
        patch.chdir(tmp_path_factory.mktemp("cluster"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # on a machine that others use, too
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        yield started
        started.shutdown()


@pytest.fixture
def config(cluster: Any, tmp_path: Path) -> BatchConfig:
    return BatchConfig(out=str(tmp_path / "runs"), ray=cluster.address, cpus_per_run=1)


@pytest.mark.slow
def test_a_batch_makes_what_single_runs_make_goes_on_and_isolates_what_fails(
    tmp_path: Path, config: BatchConfig, one_thread: None, said: Any
) -> None:
    killed = tmp_path / "killed"
    text = f"""
- a red ball
- {{prompt: a red ball, name: other, seed: 3}}
- {{prompt: two, negative_prompt: kill once {killed}}}
- {{prompt: bad, negative_prompt: kill}}
- {{prompt: worse, negative_prompt: nan}}
- {{prompt: last, steps: 9}}
- cut
"""
    cut = jobs_of(tmp_path, "- cut")[0].config
    with pytest.raises(UserError, match="became nan"):
        Generator(dataclasses.replace(cut, device="cpu"), guidance=BallGuidance(nan_at=7)).run()
    assert load_checkpoint(Path(cut.out) / "checkpoint.safetensors").step == 6
    jobs = jobs_of(tmp_path, text)
    assert not any(job.done for job in jobs)
    outcomes = run_batch(jobs, config, "cpu", guides.create)
    errors = {name: outcome.error for name, outcome in outcomes.items() if outcome.error}
    assert set(errors) == {"bad", "worse"}
    assert errors["bad"].startswith("the worker died, 2 times")
    assert "became nan at step 2" in errors["worse"]
    assert killed.exists()
    for job in jobs:
        out = Path(job.config.out)
        assert read_outcome(out) == outcomes[job.name]
        if job.name in errors:
            assert not (out / "mesh.glb").exists()
            continue
        single = dataclasses.replace(job.config, out=str(tmp_path / f"single-{job.name}"), guidance=Config().guidance)
        Generator(single, guidance=BallGuidance()).run()
        assert (out / "mesh.glb").read_bytes() == (Path(single.out) / "mesh.glb").read_bytes()
        assert outcomes[job.name].steps == job.config.steps
    assert len({outcome.worker for outcome in outcomes.values() if outcome.worker}) > 1
    page = (tmp_path / "runs" / "index.html").read_text()
    assert "<title>5 of 7 done, 2 failed</title>" in page
    assert 'src="./a-red-ball/preview.png"' in page
    assert "failed: the worker died" in page
    assert any("7 of 7, " in line for line in said())

    # Once more: what is finished stays as it is, the others are tried again.
    before = {job.name: (Path(job.config.out) / "mesh.glb").stat() for job in jobs if job.name not in errors}
    again = jobs_of(tmp_path, text)
    assert [job.name for job in again if not job.done] == ["bad", "worse"]
    some = [job for job in again if job.name != "bad"]
    assert run_batch(some, config, "cpu", guides.create)["worse"].error == errors["worse"]
    for name, stat in before.items():
        assert (tmp_path / "runs" / name / "mesh.glb").stat().st_mtime_ns == stat.st_mtime_ns


@pytest.mark.slow
def test_a_node_that_joins_is_used(tmp_path: Path, config: BatchConfig, cluster: Any) -> None:
    """The two runs on the first node wait for a third to be done, which only a new node has room for."""
    third = tmp_path / "runs" / "third" / "outcome.json"
    rows = [f"- {{prompt: {name}, negative_prompt: wait {third}}}" for name in ("first", "second")]
    jobs = jobs_of(tmp_path, "\n".join([*rows, "- third"]))
    with ThreadPoolExecutor(1) as batch:  # Ray adds a node in the main thread only
        running = batch.submit(run_batch, jobs, config, "cpu", guides.create)
        while not all((Path(job.config.out) / "checkpoint.safetensors").exists() for job in jobs[:2]):
            assert not running.done()
            time.sleep(0.1)
        node = cluster.add_node(num_cpus=1)
        outcomes = running.result()
    cluster.remove_node(node)
    assert [outcome.error for outcome in outcomes.values()] == [None] * 3
    assert next(iter(outcomes)) == "third"
    assert len({outcome.worker for outcome in outcomes.values()}) == 3


@pytest.mark.slow
def test_the_run_of_a_node_that_is_lost_is_repeated(tmp_path: Path, config: BatchConfig, cluster: Any) -> None:
    """Three runs wait in their first step, one of them on a node that is lost then: it begins again on the other.

    A fourth, which waits for its turn, is sent to the worker that does not answer, and is not lost either.
    """
    begun = tmp_path / "begun"
    rows = [f"- {{prompt: {name}, negative_prompt: wait {begun}}}" for name in ("first", "second", "third")]
    jobs = jobs_of(tmp_path, "\n".join([*rows, "- fourth"]))
    node = cluster.add_node(num_cpus=1)
    with ThreadPoolExecutor(1) as batch:
        running = batch.submit(run_batch, jobs, config, "cpu", guides.create)
        while not all((Path(job.config.out) / "checkpoint.safetensors").exists() for job in jobs[:3]):
            assert not running.done()
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)
        time.sleep(1)  # the two that are left do not take the fourth
        begun.touch()
        outcomes = running.result()
    assert [outcome.error for outcome in outcomes.values()] == [None] * 4
    assert all(outcome.faces > 0 for outcome in outcomes.values())
    assert not list(tmp_path.rglob("begun.txt"))


@pytest.mark.slow
def test_a_cluster_without_room_or_out_of_reach_is_one_line(tmp_path: Path, config: BatchConfig) -> None:
    jobs = jobs_of(tmp_path, "- a ball")
    with pytest.raises(
        UserError, match="Ray has no room for a run: it has 2 cores and 0 GPUs, and a run takes 3 cores"
    ):
        run_batch(jobs, dataclasses.replace(config, cpus_per_run=3), "cpu", guides.create)
    with pytest.raises(UserError, match=r"no room for a run.* 0\.25 GPU"):
        run_batch(jobs, dataclasses.replace(config, gpus_per_run=0.25), "cuda", guides.create)
    with pytest.raises(UserError, match="cannot reach Ray at nowhere"):
        run_batch(jobs, dataclasses.replace(config, ray="nowhere"), "cpu", guides.create)
