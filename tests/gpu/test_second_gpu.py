"""A run on another GPU than the current one: the same run, and nothing of it on the current one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
# With the embedded prior, so that its graphs are captured there, too.
RUN = """
import json, sys
import torch
from fakes import small_config
from dreamfusion_fast.training.callbacks import Callback
from dreamfusion_fast.training.generator import Generator

class Losses(Callback):
    def on_step(self, trainer, result):
        losses.append(float(result.losses["sds"]))

device, out = sys.argv[1:]
losses = []
Generator(small_config(device=device, out=out, steps=40), [Losses()]).run()
print(json.dumps({
    "losses": losses,
    "contexts": [torch._C._cuda_hasPrimaryContext(index) for index in range(2)],
    "reserved": [torch.cuda.max_memory_reserved(index) for index in range(2)],
}))
"""


def result(device: str, out: Path) -> dict[str, list[float]]:
    command = [sys.executable, "-c", RUN, device, str(out)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=TESTS)
    assert run.returncode == 0, run.stderr
    found: dict[str, list[float]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_run_on_the_second_gpu(tmp_path: Path) -> None:
    first, second = (result(f"cuda:{index}", tmp_path / str(index)) for index in range(2))
    assert second["reserved"][0] == 0 < second["reserved"][1]
    assert second["contexts"] == [False, True]
    assert (tmp_path / "1" / "mesh.glb").is_file()
    torch.testing.assert_close(second["losses"][:5], first["losses"][:5], rtol=1e-2, atol=0)
    assert len(second["losses"]) == 40
