"""The README tells the truth: its Python is that of the examples, which run, and what it names exists."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from fakes import BallGuidance, small_config

import dreamfusion_fast
from dreamfusion_fast import cli
from dreamfusion_fast.training.generator import Generator

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


# The others are in test_examples.py.
EXAMPLES = [ROOT / "examples" / f"{name}.py" for name in ("generate", "own_field", "train_field")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [
    shlex.split(line.split(" && ")[-1], comments=True)[1:]
    for block in blocks("bash")
    for line in block.splitlines()
    if line.split(" && ")[-1].startswith("dreamfusion-fast ")
]


class SmallGenerator(Generator):
    """The README's Generator, with a few short steps and without a diffusion model."""

    def __init__(self, prompt: str, **settings: Any) -> None:
        super().__init__(small_config(prompt=prompt), guidance=BallGuidance(), **settings)


def test_it_has_commands() -> None:
    assert len(COMMANDS) >= 5


def test_its_python_is_that_of_the_examples() -> None:
    """But for what each file says at its top."""
    code = [re.sub(r'\A""".*?"""\n\n', "", path.read_text(encoding="utf-8"), flags=re.DOTALL) for path in EXAMPLES]
    assert sorted(blocks("python")) == sorted(code)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dreamfusion_fast, "Generator", SmallGenerator)
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_command_and_its_options_exist(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([arguments[0], "--help"]) == 0
    described = capsys.readouterr().out
    for option in (word for word in arguments if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", described), f"{arguments[0]} has no {option}"


def test_options_of_the_table_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--help"]) == 0
    described = capsys.readouterr().out
    named = re.findall(r"(?m)^\| (`--.*?) \|", README)
    assert named
    for option in re.findall(r"`(--[\w.-]+)`", " ".join(named)):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", described), f"generate has no {option}"


def test_environment_variables_are_read_somewhere() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "dreamfusion_fast").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    names = set(re.findall(r"DREAMFUSION_FAST_[A-Z]+", README))
    assert names
    assert [name for name in sorted(names) if name not in code] == []


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/design.md",
        "docs/drop-in.md",
        "docs/memory.md",
        "docs/objects.md",
        "docs/prior.md",
        "tools/README.md",
    ],
)
def test_links_and_anchors_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        other = path.parent / name if name else path
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"(?m)^#+ (.+)$", other.read_text(encoding="utf-8"))
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
            assert anchor in anchors, target


def test_recipes_name_files_and_what_is_in_them() -> None:
    """Every path in CONTRIBUTING.md is one, and every name in code style is somewhere in the files that it names."""
    words = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", CONTRIBUTING, flags=re.DOTALL))
    paths = [ROOT / word for word in words if re.fullmatch(r"[\w./-]+/[\w./-]*|[\w-]+\.(?:md|toml)", word)]
    assert len(paths) > 20
    assert [path for path in paths if not path.exists()] == []
    named = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())
    names = [word for word in words if re.fullmatch(r"_?[A-Za-z]+(?:_?[A-Za-z]+)*_?", word)]
    assert len(names) > 20
    assert [name for name in names if name not in named] == []
