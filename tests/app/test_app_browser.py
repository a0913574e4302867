"""A person at the page, in a real browser: asks, watches, stops, resumes, turns the mesh and takes it home."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from browser import PATIENCE, browser, needs_browser, wait_until_drawn

pytest.importorskip("gradio")

from dreamfusion_fast.app.serve import serving

BALL = (sys.executable, str(Path(__file__).with_name("ball.py")))


def ask(page: Any, prompt: str, steps: int) -> None:
    page.fill("#prompt textarea", prompt)
    page.fill("#steps textarea, #steps input", str(steps))
    page.click("#make")


def said(page: Any) -> str:
    return page.locator("#panel .said").inner_text()


def wait_for(page: Any, state: str, prompt: str) -> None:
    page.locator(f"#panel .run.{state}", has_text=prompt).wait_for()


@needs_browser()
def test_a_person_makes_an_object(tmp_path: Path) -> None:
    runs, asked = tmp_path / "runs", []
    with browser(900, 700) as context:
        context.on("request", lambda request: asked.append(request.url))
        with serving(str(runs), "127.0.0.1", 0, None, device="cpu", command=BALL) as address:
            page = context.new_page()
            page.goto(address)
            ask(page, "   ", 60)
            page.locator(".toast-body", has_text="the prompt is empty").wait_for()
            ask(page, "a <b>red</b> ball", 60)
            wait_for(page, "running", "a <b>red</b> ball")
            # Progress, at least once a second and in steps, with the time that is left.
            page.wait_for_function("/step [1-9].* left/.test(document.querySelector('#panel .said').innerText)")
            changes = page.evaluate(
                """async () => {
                    const seen = [];
                    const end = performance.now() + 3000;
                    while (performance.now() < end) {
                        const said = document.querySelector("#panel .said").innerText;
                        if (said !== seen.at(-1)) seen.push(said);
                        await new Promise(done => setTimeout(done, 50));
                    }
                    return seen.length - 1;
                }"""
            )
            assert changes >= 3
            page.locator("#preview img").wait_for()  # while it runs
            # Somebody else looks at something else, and a tab is closed: nothing of it disturbs the run.
            other = context.browser.new_context().new_page()
            other.set_default_timeout(PATIENCE * 1000)
            other.goto(address)
            wait_for(other, "running", "a <b>red</b> ball")
            ask(other, "a second thing", 5)
            wait_for(other, "waiting", "a second thing")
            assert "red" in page.locator("#panel h3").inner_text()
            other.click("#stop")
            wait_for(other, "stopped", "a second thing")
            assert page.locator("#panel .running").count() == 1
            other.close()
            page.close()
            page = context.new_page()
            page.goto(address)
            wait_for(page, "running", "a <b>red</b> ball")
            page.click("#stop")
            wait_for(page, "stopped", "a <b>red</b> ball")
            assert "it can go on" in said(page)
            page.close()
        # The server is started again, and offers to go on.
        with serving(str(runs), "127.0.0.1", 0, None, device="cpu", command=BALL) as again:
            page = context.new_page()
            page.goto(again)
            (run,) = runs.glob("*red*")
            (run / "go").touch()
            page.locator("#runs button", has_text="red").click()
            wait_for(page, "stopped", "a <b>red</b> ball")
            page.click("#resume")
            wait_for(page, "done", "a <b>red</b> ball")
            viewer = page.frame_locator("#mesh iframe").locator("model-viewer")
            wait_until_drawn(viewer)
            before, box = viewer.evaluate("viewer => viewer.getCameraOrbit().theta"), viewer.bounding_box()
            middle = box["x"] + box["width"] / 2, max(box["y"], 0) + 100
            page.mouse.move(*middle)
            page.mouse.down()
            page.mouse.move(middle[0] + 120, middle[1], steps=4)
            page.mouse.up()
            viewer.evaluate(
                """async (viewer, before) => {
                    while (Math.abs(viewer.getCameraOrbit().theta - before) < 0.3)
                        await new Promise(requestAnimationFrame);
                }""",
                before,
            )
            with page.expect_download() as download:
                page.click("#glb")
            assert download.value.suggested_filename == "mesh.glb"
            home = tmp_path / "home.glb"
            download.value.save_as(home)
            assert home.read_bytes() == (run / "mesh.glb").read_bytes()
            page.get_by_role("tab", name="Turntable").click()
            page.wait_for_function("document.querySelector('#video video').readyState >= 1")
            page.close()
    local = (address, again, "data:", "blob:")
    assert [url for url in asked if not url.startswith(local)] == []
