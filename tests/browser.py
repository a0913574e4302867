"""A real browser without a window, with WebGL by software. Tests wait for events in it, however busy the machine is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 240.0  # seconds after which what is waited for is taken never to come

_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--hide-scrollbars",
)


def needs_browser() -> pytest.MarkDecorator:
    """Skips a test, and says why, where there is no browser or nothing to drive it."""
    try:
        import playwright.sync_api  # noqa: F401
    except ModuleNotFoundError:
        return pytest.mark.skip(reason="needs playwright")
    return pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@contextmanager
def browser(width: int, height: int) -> Iterator[Any]:
    """A browser with a context of its own (playwright's), of windows of this size."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=list(_OPTIONS), timeout=PATIENCE * 1000)
        context = chromium.new_context(viewport={"width": width, "height": height})
        context.set_default_timeout(PATIENCE * 1000)
        try:
            yield context
        finally:
            chromium.close()


def wait_until_drawn(viewer: Any) -> None:
    """Wait until a <model-viewer> (a locator of playwright's) has loaded its mesh, and has drawn it."""
    viewer.evaluate(
        """async viewer => {
            await customElements.whenDefined("model-viewer");
            if (!viewer.loaded) await new Promise(done => viewer.addEventListener("load", done, {once: true}));
            await viewer.updateComplete;
            for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
        }"""
    )
