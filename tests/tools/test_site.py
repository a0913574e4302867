"""The parts of the site: links, options, docstrings, pictures. The site itself is built in CI, and warnings fail it."""

from __future__ import annotations

import functools
import html
import importlib
import re
import types
from pathlib import Path

import pytest

from dreamfusion_fast.cli import COMMANDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "documentation"))


@pytest.mark.parametrize(
    ("page", "written", "shown"),
    [
        ("index.md", "docs/memory.md#the-plan", "memory.md#the-plan"),
        ("index.md", "docs/images/meshes.png", "images/meshes.png"),
        ("index.md", "CONTRIBUTING.md", "contributing.md"),
        ("memory.md", "design.md", "design.md"),
        ("prior.md", "../tools/README.md", "prior-training.md"),
        ("api/guidance.md", "../../CONTRIBUTING.md#a-field", "../contributing.md#a-field"),
        ("prior-training.md", "../docs/prior.md", "prior.md"),
        ("renderer.md", "../examples/nerf.py", "source/examples/nerf.py.md"),
        ("api/ops.md", "../../examples/hash_grid_op.py", "../source/examples/hash_grid_op.py.md"),
        ("memory.md", "#the-plan", "#the-plan"),
        ("index.md", "https://arxiv.org/abs/2209.14988", "https://arxiv.org/abs/2209.14988"),
    ],
)
def test_links_lead_to_pages(page: str, written: str, shown: str) -> None:
    import repository

    assert repository.with_links(f"See [it]({written}).", page) == f"See [it]({shown})."


def test_pictures_for_dark_pages_are_the_themes() -> None:
    import repository

    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    shown = repository.with_links(text, "how-it-works.md")
    assert "<picture>" not in shown
    assert "(images/step-light.svg#only-light)" in shown
    assert shown.count("-dark.svg#only-dark)") == text.count("<picture>") >= 5


def test_code_has_no_links() -> None:
    import repository

    text = "```python\nlayers[0](docs/x)\n```\n[a](examples/nerf.py)"
    assert repository.with_links(text, "index.md") == text.replace("(examples/nerf.py)", "(source/examples/nerf.py.md)")
    assert repository.linked_files(text, "index.md") == {"examples/nerf.py"}


def test_a_notebook_is_shown_as_text_and_code() -> None:
    import repository

    page = repository.file_page("examples/notebooks/nerf.ipynb")
    assert page.startswith("# Train a NeRF by the renderer\n")
    assert "```python\nsteps = 400\nviews = 64\n```" in page


@functools.cache
def options_page() -> str:
    import options

    return options.all_commands()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_on_the_page(command: str) -> None:
    import options

    page = options_page()
    assert f"\n### {command}\n" in f"\n{page}"
    named = set(re.findall(r"(?m)^[│ ] *(--[\w.-]+)", options.help_of(command)))
    assert [name for name in sorted(named - {"--help"}) if f"`{name}`" not in page and f" {name} " not in page] == []


def test_options_are_read_as_they_are_printed() -> None:
    page = options_page()
    assert (
        "| `--seed` | INT | Seeds everything random. On a CPU the same seed gives the same mesh. (default: 0) |" in page
    )
    assert "| `--perp-neg`" not in page
    assert "| `--guidance.perp-neg`, `--guidance.no-perp-neg` |  | Perp-Neg" in page
    assert "| `--batch` | `None` or INT |" in page
    assert "| `-n`, `--n` | INT | Number of pictures. (default: 9) |" in page
    assert ":class:" not in page
    assert page.count("`--optim.lr-table`") == 1  # batch has the options of generate


def test_docstrings_are_in_the_parsers_spelling() -> None:
    pytest.importorskip("griffe")
    import docstrings

    text = (
        "Args:\nfield: what to render,\n    by :class:`Rays`.\nconfig: settings.\n\nRaises:\n    ValueError: a reason."
    )
    shown = (
        "Args:\n    field: what to render,\n        by `Rays`.\n    config: settings.\n\n"
        "Raises:\n    ValueError: a reason."
    )
    assert docstrings.plain(text) == shown
    assert docstrings.plain("A.\n\nExample:\n    >>> 1\n") == "A.\n\nExamples:\n    >>> 1\n"


@pytest.mark.parametrize("package", ["fields", "rendering", "ops", "guidance", "export"])
def test_every_public_name_is_in_the_reference(package: str) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"(?m)^::: dreamfusion_fast\.[\w.]*?(\w+)$", pages))
    names = set(importlib.import_module(f"dreamfusion_fast.{package}").__all__)
    twins = {name for name in names if name.endswith("_reference")}  # with the op's arguments
    assert len(names) > 10
    assert names - twins - shown == set()


def test_pictures_are_those_that_the_script_draws() -> None:
    import diagrams

    drawn = diagrams.files()
    assert len(drawn) >= 10
    for path, text in drawn.items():
        assert path.read_text(encoding="utf-8") == text, path.name


def test_what_a_page_would_fetch_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mkdocs")
    import hooks

    (tmp_path / "good.html").write_text(
        '<script src="a.js"></script><img src="b.png"><a href="https://example.org">c</a>'
        '<link rel="canonical" href="https://example.org/">'
    )
    config = types.SimpleNamespace(site_dir=str(tmp_path))
    hooks.on_post_build(config)
    assert caplog.messages == []
    (tmp_path / "bad.html").write_text(
        '<script defer src="https://example.org/a.js"></script><link href="//example.org/b.css" rel="stylesheet">'
        "<img alt=c src=http://example.org/c.png>"
    )
    hooks.on_post_build(config)
    assert caplog.messages == [
        f"bad.html fetches {name}"
        for name in ("https://example.org/a.js", "//example.org/b.css", "http://example.org/c.png")
    ]


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tools" / "README.md"])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_github_and_the_site_read_the_same(path: Path) -> None:
    """Lists without a line before them, words in angle brackets: the two kinds of Markdown differ in such things."""
    markdown = pytest.importorskip("markdown")
    markdown_it = pytest.importorskip("markdown_it")
    text = path.read_text(encoding="utf-8")
    github = markdown_it.MarkdownIt("commonmark").enable("table").render(text)
    site = markdown.markdown(
        text, extensions=["admonition", "attr_list", "sane_lists", "tables", "pymdownx.superfences"]
    )
    for element in ("li", "ol", "table", "tr", "td", "h1", "h2", "h3", "a", "img", "em", "strong"):
        counts = [len(re.findall(rf"<{element}[ >]", page)) for page in (github, site)]
        assert counts[0] == counts[1], element
    words = [html.unescape(re.sub(r"<[^>]+>", "", page)).split() for page in (github, site)]
    assert "".join(words[0]) == "".join(words[1])
