"""Files of prompts: what they mean, and every mistake by line and key before anything starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from fakes import write_amortised

from dreamfusion_fast.batch.jobs import Job, ProblemsError, read_jobs
from dreamfusion_fast.batch.outcome import Outcome, write_outcome
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.training.checkpoint import save_checkpoint
from dreamfusion_fast.training.config import Config


def base(preset: str | None, guidance: str | None) -> Config:
    if preset is not None:
        return Config.from_preset(preset)
    return Config.for_guidance(guidance or "embedded", steps=7)


def read(folder: Path, text: str, suffix: str = ".yaml") -> list[Job]:
    file = folder / f"prompts{suffix}"
    file.write_text(text, encoding="utf-8")
    return read_jobs(file, folder / "runs", base)


def problems(folder: Path, text: str, suffix: str = ".yaml") -> list[str]:
    """What is wrong, each line without the file's folder."""
    with pytest.raises(ProblemsError) as caught:
        read(folder, text, suffix)
    return [line.removeprefix(f"{folder}/") for line in caught.value.problems]


def test_text_has_a_prompt_per_line(tmp_path: Path) -> None:
    jobs = read(tmp_path, "\ufeffan armchair\n\n# not this\n  a chair, red \nLa chaise é\n", ".txt")
    assert [(job.line, job.config.prompt, job.name) for job in jobs] == [
        (1, "an armchair", "an-armchair"),
        (4, "a chair, red", "a-chair-red"),
        (5, "La chaise é", "la-chaise-é"),
    ]
    assert [job.config.out for job in jobs] == [str(tmp_path / "runs" / job.name) for job in jobs]
    assert {(job.config.steps, job.done) for job in jobs} == {(7, False)}


def test_rows_have_a_start_of_their_own(tmp_path: Path) -> None:
    file = write_amortised(tmp_path / "1e3")  # taken as text
    jobs = read(tmp_path, f"prompt,init,init_code\na chair,{file},4\na table,scratch,\na lamp,,\n", ".csv")
    assert [(job.config.init, job.config.init_code) for job in jobs] == [
        (str(file), 4), ("scratch", None), ("amortised", None),
    ]  # fmt: skip
    (problem,) = problems(tmp_path, f"- {{prompt: a chair, init: {tmp_path / 'none'}}}")
    assert f"--init {tmp_path / 'none'}: cannot be read" in problem


def test_rows_have_settings_of_their_own(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        """
- a chair
- prompt: a table
  seeds: [1, 5]
  negative_prompt: ugly
  optim.lr-table: 0.02
  loss: {opacity: {start: 0.1}, ray_entropy.end: 0.5}
- {prompt: a lamp, preset: dreamfusion, steps: 4, name: Lamp 2}
- {prompt: a bed, guidance.name: sdxl}
""",
    )
    assert [(job.line, job.name, job.config.seed) for job in jobs] == [
        (2, "a-chair", 0),
        (3, "a-table-seed1", 1),
        (3, "a-table-seed5", 5),
        (8, "Lamp 2", 0),
        (9, "a-bed", 0),
    ]
    table = jobs[1].config
    assert (table.guidance.negative_prompt, table.optim.lr_table, table.steps) == ("ugly", 0.02, 7)
    assert (table.loss.opacity.start, table.loss.ray_entropy.end) == (0.1, 0.5)
    lamp = Config.from_preset("dreamfusion", prompt="a lamp", steps=4, out=jobs[3].config.out)
    assert jobs[3].config == lamp
    assert jobs[4].config.field == base(None, "sdxl").field


def test_a_table_has_a_column_per_setting(tmp_path: Path) -> None:
    jobs = read(
        tmp_path,
        "prompt, seeds,negative_prompt,log.tensorboard,guidance.revision,optim.betas\n"
        '"a chair, red",1 2,007,false,12,"[0.8, 0.9]"\n'
        "42,,,,,\n",
        ".csv",
    )
    first, _, last = (job.config for job in jobs)
    assert (first.prompt, first.seed, first.guidance.negative_prompt, first.log.tensorboard) == (
        "a chair, red",
        1,
        "007",
        False,
    )
    assert (first.guidance.revision, first.optim.betas) == ("12", (0.8, 0.9))
    assert (last.prompt, last.log.tensorboard, jobs[-1].line) == ("42", True, 3)


def test_all_that_is_wrong_is_said_with_line_and_key(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """
- a chair
- {prompt: a, stepz: 3, steps: 0, optim.lr_table: [1], seed: 1, seeds: [1]}
- {prompt: " ", out: x, device: cpu}
- 7
- {prompt: c, name: ../x, preset: dreamfuson}
- {prompt: d, seeds: [1, 1]}
- {prompt: e, seeds: [a]}
- {prompt: f, loss.opacity.begin: 0.9, loss.opacity.until: 0.1}
- {prompt: g, guidance.name: nothing}
- {prompt: h, guidance: x, guidance.mode: sds}
- a chair
- {prompt: i, steps: 3, "steps ": 4}
- {prompt: j, memory: lots}
""",
    )
    lines = [line.removeprefix("prompts.yaml line ") for line in found]
    expected = [
        "5: got 7, want a prompt or a mapping with one",
        "13: steps is given twice",
        "3: seed, seeds: got both",
        "3: unknown key stepz; did you mean steps?",
        "3: steps: got 0, want at least 1",
        "3: optim.lr_table: got [1], want a number",
        "4: out: runs are in the batch's folder",
        "4: device: it is the batch's to say",
        "4: prompt: got ' ', want what to make",
        "6: name: got '../x', want the name of a folder",
        "6: unknown preset 'dreamfuson'; known:",
        "7: seeds: got [1, 1], want each once",
        "8: seeds: got ['a'], want whole numbers",
        "9: loss.opacity.begin, until: got 0.9, 0.1",
        "10: unknown guidance 'nothing': choose one of",
        "11: guidance.mode: guidance has a value of its own",
        "11: guidance: got 'x', want a mapping",
        "14: memory has to be a size",
        "12: name: is a-chair-seed0, as in line 2",
    ]
    missing = [start for start in expected if not any(line.startswith(start) for line in lines)]
    assert missing == [], lines
    assert len(lines) == len(expected), "\n".join(lines)


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".txt", "\n# x\n", "holds no prompt"),
        (".yaml", "a: 1", "want a list"),
        (".yaml", "- [", "is no valid YAML"),
        (".yaml", "- &x a\n- *x", "aliases are not taken"),
        (".csv", "name,steps\n", "want names, each once, with prompt among them"),
        (".csv", "prompt,prompt\nx,y\n", "prompt twice"),
        (".csv", 'prompt\n"x" y\n', "line 2: no valid CSV"),
        (".csv", "prompt,steps\nx,1,2\n", r"line 2: \['2'\] is in no column"),
        (".csv", "prompt,steps\nx,many\n", "line 2: steps: got 'many', want a whole number"),
        (".txt", "x\n" * 2**20 + "x", "is larger than 2 MiB"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, suffix: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, text, suffix)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*absent: No such file"):
        read_jobs(tmp_path / "absent", tmp_path, base)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        read_jobs(tmp_path / "x.txt", tmp_path, base)


def test_what_is_there_is_done_cut_or_of_other_settings(tmp_path: Path) -> None:
    (job,) = read(tmp_path, "- a chair")
    out = Path(job.config.out)
    out.mkdir(parents=True)
    saved = dataclasses.replace(job.config, batch=2, device="cpu", memory=123)
    saved.save(out / "config.yaml")
    assert problems(tmp_path, "- a chair")[0].endswith("move it away or choose another with --out")
    save_checkpoint(out / "checkpoint.safetensors", tensors={}, config=saved, step=3)
    assert not read(tmp_path, "- a chair")[0].done
    write_outcome(out, Outcome("a line"))
    (out / "mesh.glb").touch()
    assert not read(tmp_path, "- a chair")[0].done
    write_outcome(out, Outcome())
    assert read(tmp_path, "- a chair")[0].done
    (found,) = problems(tmp_path, "- {prompt: a chair, steps: 8}")
    assert "a-chair holds a run with other settings (steps: 7, here 8); give the row another name" in found
