"""Makes the pictures of docs/app.md: a person's way through the page of a server that is there.

Usage: dreamfusion-fast app --runs FOLDER --device cpu &
       python tools/app_pictures.py http://127.0.0.1:7860 docs/images

It asks for an object with the embedded prior, so it takes minutes. Needs playwright and chromium (tests/browser.py).
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import browser, wait_until_drawn

PROMPT, STEPS = "a potted cactus", "300"
_MINUTE = 60_000  # milliseconds


def save(page: Any, path: Path) -> None:
    """A picture of the page with 128 colours, which is a third of the size and looks the same."""
    page.mouse.move(0, 0)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(128).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    with browser(1200, 800) as context:
        page = context.new_page()
        page.goto(given.address)
        earlier = page.locator("#runs button", has_text=PROMPT)
        page.locator("#queue .queue").wait_for()
        page.fill("#prompt textarea", PROMPT)
        page.fill("#steps textarea, #steps input", STEPS)
        page.click("#draw")
        page.locator("#drawn img").wait_for(timeout=10 * _MINUTE)
        if earlier.count():  # of a try of this that was stopped
            earlier.first.click()
            page.locator("#resume:enabled").click()
        else:
            page.click("#make")
        page.locator("#panel .running h3", has_text=PROMPT).wait_for()
        half = rf"/step {int(STEPS) // 200}[0-9][0-9] .* left/.test(document.querySelector('#panel .said').innerText)"
        page.wait_for_function(half, timeout=30 * _MINUTE)
        page.locator("#preview img").wait_for()
        save(page, given.out / "app-running.png")
        page.locator("#panel .done").wait_for(timeout=60 * _MINUTE)
        wait_until_drawn(page.frame_locator("#mesh iframe").locator("model-viewer"))
        save(page, given.out / "app-mesh.png")


if __name__ == "__main__":
    main()
