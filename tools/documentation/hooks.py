"""Hooks that mkdocs calls while it builds the site (`hooks` of mkdocs.yml)."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import options
import repository
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_log = logging.getLogger("mkdocs.hooks.dreamfusion_fast")
# What is between these comments is what GitHub shows; the site has the help of every command in its place.
HELP = re.compile(r"<!-- help -->.*?<!-- /help -->", re.DOTALL)
# Whatever a page would fetch from another host when it is opened.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["']?((?:https?:)?//[^"'\s>]+)""",
    re.IGNORECASE,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents outside of docs/, and the files that pages link to."""
    for page, path in repository.DOCUMENTS.items():
        files.append(File.generated(config, page, content=_read(path)))
    linked: set[str] = set()
    for file in files.documentation_pages():
        linked |= repository.linked_files(file.content_string, file.src_uri)
    for path in sorted(linked):
        if not (repository.ROOT / path).is_file():
            _log.warning("a page links to %s, which is no file", path)
            continue
        files.append(File.generated(config, repository.page_of(path), content=repository.file_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into those of the site, and fill in the help of the commands."""
    text = repository.with_links(markdown, page.file.src_uri)
    return HELP.sub(lambda _: options.all_commands(), text)


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of whatever would need a network."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        for match in _FETCHED.finditer(path.read_text(encoding="utf-8")):
            _log.warning("%s fetches %s", path.relative_to(config.site_dir), match[1] or match[2])


def _read(path: str) -> str:
    return (repository.ROOT / path).read_text(encoding="utf-8")
