"""The example of docs/batch.md is read as it says."""

from __future__ import annotations

import re
from pathlib import Path

from dreamfusion_fast.batch.jobs import read_jobs
from dreamfusion_fast.training.config import Config

DOCS = Path(__file__).parents[2] / "docs" / "batch.md"


def test_the_example_is_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    file = tmp_path / "prompts.yaml"
    file.write_text(text)
    jobs = read_jobs(file, tmp_path, lambda preset, guidance: Config.for_guidance(guidance or "embedded"))
    assert [(job.name, job.config.seed, job.config.guidance.name) for job in jobs] == [
        ("an-armchair", 0, "embedded"),
        ("a-wooden-table-seed0", 0, "embedded"),
        ("a-wooden-table-seed1", 1, "embedded"),
        ("a-teapot", 0, "stable-diffusion"),
    ]
