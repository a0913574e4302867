"""Files of the repository as pages of the site, and links that lead to them both there and on GitHub.

Documents are written for GitHub: their links are relative paths in the repository. On the site, a link to another
document leads to its page, and one to any other file, such as an example, to a page that shows the file.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Documents outside of docs/ that are pages: page -> path in the repository.
DOCUMENTS = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "prior-training.md": "tools/README.md",
}
_PAGES = {path: page for page, path in DOCUMENTS.items()}
_LANGUAGES = {".py": "python", ".ipynb": "json", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".toml": "toml"}
# How GitHub wants a picture that has a version for dark pages. The theme's own way follows its switch, too.
_PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">'
    r'\s*<img alt="([^"]*)" src="([^"]+)">\s*</picture>'
)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def source_of(page: str) -> str | None:
    """The path in the repository of the document behind `page`; None for a page that is made of other things."""
    if page.startswith("source/"):
        return None
    return DOCUMENTS.get(page, f"docs/{page}")


def page_of(path: str) -> str:
    """The page, or for pictures the file, that shows `path`, a path in the repository."""
    if path in _PAGES:
        return _PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def with_links(text: str, page: str) -> str:
    """The Markdown `text` of `page`, with links between paths of the repository turned into links between pages.

    A picture with a version for dark pages becomes two, of which the theme shows one.
    """
    text = _PICTURE.sub(r"![\2](\3#only-light)![\2](\1#only-dark)", text)
    return "".join(_prose(part, page) if prose else part for prose, part in _parts(text))


def linked_files(text: str, page: str) -> set[str]:
    """Paths in the repository that `text` links to and that are neither documents nor pictures of them."""
    targets = [match[2] for prose, part in _parts(text) if prose for match in _LINK.finditer(part)]
    paths = {path for path in (_path(target, page) for target in targets) if path is not None}
    return {path for path in paths if page_of(path).startswith("source/")}


def file_page(path: str) -> str:
    """A page that shows the file `path`: a notebook as text and code, any other file as it is."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".ipynb"):
        return _notebook(json.loads(text))
    fence = "`" * (3 + max((len(ticks) for ticks in re.findall("`{3,}", text)), default=0))
    head = "---\nsearch: {exclude: true}\n---\n"  # all its words would hide the pages that are about it
    return f"{head}# {path}\n\n{fence}{_LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def _notebook(notebook: dict[str, object]) -> str:
    cells = notebook["cells"]
    assert isinstance(cells, list)
    texts = ["".join(cell["source"]) for cell in cells]
    return "\n\n".join(
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    )


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """`text` in order, as prose (True) and fenced code (False)."""
    for index, part in enumerate(re.split(r"(?ms)^(```.*?^```[ ]*$)", text)):
        yield index % 2 == 0, part


def _prose(text: str, page: str) -> str:
    def replaced(match: re.Match[str]) -> str:
        path = _path(match[2], page)
        if path is None:
            return match[0]
        anchor = match[2].partition("#")[2]
        link = posixpath.relpath(page_of(path), posixpath.dirname(page) or ".")
        return f"{match[1]}{link}{'#' + anchor if anchor else ''}{match[3]}"

    return _LINK.sub(replaced, text)


def _path(target: str, page: str) -> str | None:
    """The path in the repository that a link of `page` means; None where it leads elsewhere or stays on the page."""
    source, name = source_of(page), target.partition("#")[0]
    if source is None or not name or re.match(r"[a-z]+:", name):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
