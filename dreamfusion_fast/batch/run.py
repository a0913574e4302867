"""The runs of a batch on Ray's workers.

Ray places workers, restarts those that die, and repeats what failed. Here is what it is told, what became of each run,
and the one thing that Ray leaves to its caller: to send a run again that reached no worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dreamfusion_fast.batch.config import BatchConfig
from dreamfusion_fast.batch.jobs import Job
from dreamfusion_fast.batch.outcome import Outcome, forget_begun, read_outcome, times_begun, write_outcome
from dreamfusion_fast.batch.page import write_page
from dreamfusion_fast.batch.worker import CreateGuidance, Worker
from dreamfusion_fast.errors import UserError, described, one_line
from dreamfusion_fast.guidance.creation import create_guidance
from dreamfusion_fast.io import claimed

_log = logging.getLogger(__name__)

_RETRIES = 1
# For so many seconds a run is sent again when no worker answers. Ray asks each node every 3 s and gives it up after 5
# questions without an answer; until then, calls of its workers fail at once.
_UNREACHABLE = 180.0
# Seconds between two looks at whether nodes have joined the cluster, and before a run is sent again.
_LOOK = 2.0
# Of Ray's store of objects, which takes a part of the machine's memory otherwise: all that passes is settings.
_STORE = 100 << 20


def run_batch(
    jobs: Sequence[Job], config: BatchConfig, device: str = "auto", create: CreateGuidance = create_guidance
) -> dict[str, Outcome]:
    """Run what is not done yet, and write `index.html`, anew after each run.

    A run is repeated once, from its last checkpoint, if it fails, its worker is killed or its node is lost.

    Args:
        jobs: from `read_jobs`.
        config: where and on what.
        device: auto, cpu or cuda, for all runs.
        create: makes the guidance, in the worker.

    Returns:
        The outcome of each run, by name.

    Raises:
        UserError: Ray is not installed, not reached, or has no room for a run; the folder is in use.
    """
    open_jobs = [job for job in jobs if not job.done]
    with claimed(config.out) as folder:
        outcomes = {job.name: read_outcome(Path(job.config.out)) or Outcome() for job in jobs if job.done}
        write_page(folder.path, jobs, outcomes)
        if open_jobs:
            with _ray(config.ray) as ray:
                for job, outcome in _outcomes(ray, open_jobs, config, device, create):
                    outcomes[job.name] = outcome
                    write_page(folder.path, jobs, outcomes)
                    said = f"failed: {outcome.error}" if outcome.error else f"done in {outcome.seconds:.0f} s"
                    _log.info("%d of %d, %s: %s", len(outcomes), len(jobs), job.name, said)
    return outcomes


@contextlib.contextmanager
def _ray(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`, or to one of its own that ends with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError('ray is not installed: pip install "dreamfusion-fast[batch]"') from error
    own = {"address": "local", "object_store_memory": _STORE, "include_dashboard": False}
    options = {"address": address} if address else own
    try:
        ray.init(**options, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # of many kinds
        what = f"cannot reach Ray at {address}" if address else "cannot start Ray here"
        raise UserError(f"{what}: {one_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _outcomes(
    ray: Any, jobs: Sequence[Job], config: BatchConfig, device: str, create: CreateGuidance
) -> Iterator[tuple[Job, Outcome]]:
    """Each job with its outcome, as they end."""
    from ray.util import ActorPool

    room = _Room(ray.nodes, config, device)
    slots = room.slots()
    if not slots:
        raise UserError(f"Ray has no room for a run: it has {room.there()}, and a run takes {room.taken()}")
    _log.info("%d runs on %d workers, each with %s", len(jobs), min(slots, len(jobs)), room.taken())
    # A worker that dies is started again, and the run that it had is repeated, as one whose method raised is.
    # Retries are said of the actor: with those of a call alone, Ray does not wait until the worker is there again.
    kind = ray.remote(Worker).options(
        max_restarts=-1, max_task_retries=_RETRIES, num_cpus=room.cpus, num_gpus=room.gpus
    )
    running: dict[Any, Job] = {}
    unreachable: dict[str, float] = {}  # since when

    def start(worker: Any, job: Job) -> Any:
        reference = worker.run.options(retry_exceptions=True).remote(job)
        running[reference] = job
        return reference

    def new_worker() -> Any:
        return kind.remote(create, room.cpus, room.gpus or 1.0)

    workers = min(slots, len(jobs))
    pool = ActorPool([new_worker() for _ in range(workers)])
    for job in jobs:
        forget_begun(Path(job.config.out))
        pool.submit(start, job)
    left = {job.name: job for job in jobs}
    while pool.has_next():
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):  # which run it is of is seen below
            pool.get_next_unordered(timeout=_LOOK)
        ended, _ = ray.wait(list(running), num_returns=len(running), timeout=0) if running else ([], [])
        for reference in ended:
            job = running.pop(reference)
            if _to_be_sent_again(ray, reference, job):
                since = unreachable.setdefault(job.name, time.monotonic())
                if time.monotonic() - since < _UNREACHABLE:
                    time.sleep(_LOOK)
                    pool.submit(start, job)
                    continue
            del left[job.name]
            outcome = _outcome_of(ray, reference, job)
            forget_begun(Path(job.config.out))
            yield job, outcome
        while workers < min(room.slots(), len(left)):  # nodes have joined
            workers += 1
            pool.push(new_worker())
        while pool.has_free():  # a worker of a node that is lost begins again where there is room
            pool.pop_idle()
    for job in left.values():
        yield job, _kept(job, Outcome(error="not begun: no worker could be started"))


def _to_be_sent_again(ray: Any, reference: Any, job: Job) -> bool:
    """Whether a worker did not answer, and the run was not begun as often as it may be.

    Ray counts a call that reached no worker as a try. The worker of a lost node would use up the tries of its run and
    then those of each run that waits.
    """
    try:
        ray.get(reference)
    except ray.exceptions.ActorUnavailableError:
        return times_begun(Path(job.config.out)) <= _RETRIES
    except ray.exceptions.RayError:
        pass
    return False


def _outcome_of(ray: Any, reference: Any, job: Job) -> Outcome:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # what the worker raised
        outcome = Outcome(error=one_line(str(error.cause)) if error.cause else described(error))
    except ray.exceptions.RayError as error:
        times = times_begun(Path(job.config.out))
        said = f"the worker died, {times} time{'s' * (times > 1)}" if times else "no worker could begin it"
        outcome = Outcome(error=f"{said} ({one_line(error)})")
    return _kept(job, outcome)


def _kept(job: Job, outcome: Outcome) -> Outcome:
    """The outcome of a run that failed, once it is in the run's folder."""
    with contextlib.suppress(OSError):
        folder = Path(job.config.out)
        folder.mkdir(exist_ok=True)
        write_outcome(folder, outcome)
    return outcome


class _Room:
    """What a run takes, and how many fit on the nodes there are.

    Args:
        nodes: returns Ray's list of nodes.
        config: of the batch.
        device: auto, cpu or cuda.
    """

    def __init__(self, nodes: Callable[[], list[dict[str, Any]]], config: BatchConfig, device: str) -> None:
        self._nodes, self._most = nodes, config.workers
        with_gpus = device != "cpu" and any(node.get("GPU", 0) for node in self._resources())
        self.gpus = config.gpus_per_run if with_gpus or device == "cuda" else 0.0
        self.cpus = config.cpus_per_run or self._share_of_cpus()

    def _resources(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._nodes() if node["Alive"]]

    def _share_of_cpus(self) -> int:
        """Half of the cores of a node, or as many as there are for each run on its GPUs."""
        shares = []
        for node in self._resources():
            runs = 2 if not self.gpus else int(node.get("GPU", 0) / self.gpus)
            if runs:
                shares.append(max(1, int(node.get("CPU", 0)) // runs))
        return min(shares, default=1)

    def slots(self) -> int:
        """Runs that fit at a time."""
        count = 0
        for node in self._resources():
            runs = int(node.get("CPU", 0) / self.cpus)
            if self.gpus:
                runs = min(runs, int(node.get("GPU", 0) / self.gpus + 1e-9))
            count += runs
        return count if self._most is None else min(count, self._most)

    def there(self) -> str:
        """The resources of all nodes, in words."""
        totals = [sum(node.get(kind, 0) for node in self._resources()) for kind in ("CPU", "GPU")]
        return "{:g} cores and {:g} GPUs".format(*totals)

    def taken(self) -> str:
        """What a run takes, in words."""
        cores = f"{self.cpus} core{'s' if self.cpus > 1 else ''}"
        return f"{cores} and {self.gpus:g} GPU" if self.gpus else cores
