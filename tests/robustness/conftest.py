"""A server of runs on a small prior, and a cache of their own."""

from __future__ import annotations

import pytest
from fakes import look_small, small_config, write_tiny_prior
from robustness.processes import Server

from dreamfusion_fast.training.sections import LogConfig

EVERY = 2  # steps between checkpoints


@pytest.fixture(autouse=True)
def _small_looks(monkeypatch):
    look_small(monkeypatch)


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Starts servers, which end with the module."""
    folder, servers = tmp_path_factory.mktemp("shared"), []
    weights = write_tiny_prior(folder / "prior")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREAMFUSION_FAST_CACHE", str(folder / "cache"))
        patch.delenv("DREAMFUSION_FAST_DEBUG", raising=False)
        # A server forks, and what it starts may be killed while it waits for threads.
        patch.setenv("OMP_NUM_THREADS", "1")

        def start():
            servers.append(Server(weights))
            return servers[-1]

        yield start
        for server in servers:
            server.close()


@pytest.fixture(scope="module")
def server(serve):
    return serve()


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    log = LogConfig(preview_every=2, checkpoint_every=EVERY, tensorboard=False, progress_bar=False)
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    small_config(prompt="", steps=5, log=log).save(file)
    return file
