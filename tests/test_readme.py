"""README and docs tell the truth: their Python is that of the examples, which run, and what they name exists."""

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
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tools" / "README.md"])
}
CONTRIBUTING = DOCUMENTS["CONTRIBUTING.md"]
# Those that are about using the package.
GUIDES = [text for name, text in DOCUMENTS.items() if name == "README.md" or name.startswith("docs/")]


# The others are in test_examples.py.
EXAMPLES = [ROOT / "examples" / f"{name}.py" for name in ("generate", "own_field", "train_field")]


def blocks(language: str, texts: list[str]) -> list[str]:
    return [
        block for text in texts for block in re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


COMMANDS = [
    shlex.split(line.split(" && ")[-1], comments=True)[1:]
    for block in blocks("(?:bash)?", GUIDES)
    for line in block.replace("\\\n", " ").splitlines()
    if line.split(" && ")[-1].startswith("dreamfusion-fast ")
]


class SmallGenerator(Generator):
    """The example's Generator, with a few short steps and without a diffusion model."""

    def __init__(self, prompt: str, **settings: Any) -> None:
        super().__init__(small_config(prompt=prompt), guidance=BallGuidance(), **settings)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 15


def test_the_readme_is_read_in_two_minutes() -> None:
    assert len(DOCUMENTS["README.md"].splitlines()) <= 150


def test_no_paragraph_is_there_twice() -> None:
    paragraphs = [" ".join(part.split()) for text in GUIDES for part in re.split(r"\n\s*\n|\n(?=[|#-])", text)]
    long = [paragraph for paragraph in paragraphs if len(paragraph) > 120]
    assert len(long) > 200
    assert {paragraph for paragraph in long if long.count(paragraph) > 1} == set()


def test_their_python_is_that_of_the_examples() -> None:
    """But for what each file says at its top."""
    pages = [DOCUMENTS[name] for name in ("README.md", "docs/python.md", "docs/renderer.md")]
    code = [re.sub(r'\A""".*?"""\n\n', "", path.read_text(encoding="utf-8"), flags=re.DOTALL) for path in EXAMPLES]
    assert sorted(blocks("python", pages)) == sorted(code)


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
    named = re.findall(r"(?m)^\| (`--.*?) \|", DOCUMENTS["docs/command-line.md"])
    assert named
    for option in re.findall(r"`(--[\w.-]+)`", " ".join(named)):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", described), f"generate has no {option}"


def test_environment_variables_are_read_somewhere() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "dreamfusion_fast").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    names = set(re.findall(r"DREAMFUSION_FAST_[A-Z]+", DOCUMENTS["docs/install.md"]))
    assert names
    assert [name for name in sorted(names) if name not in code] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_anchors_lead_somewhere(document: str) -> None:
    path = ROOT / document
    text = re.sub(r"(?ms)^```.*?^```$", "", DOCUMENTS[document])
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
        r'<(?:img|source) [^>]*(?:src|srcset)="([^"]+)"', text
    ):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        other = path.parent / name if name else path
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"(?m)^#+ (.+)$", DOCUMENTS[str(other.resolve().relative_to(ROOT))])
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
