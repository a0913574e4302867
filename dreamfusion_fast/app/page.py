"""The page, in gradio's parts. It only shows what `Jobs` says, so it may be closed, reloaded, and open many times.

Which run a page shows is that page's own; the queue is everybody's.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import html
import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import hash_bytes

from dreamfusion_fast import view
from dreamfusion_fast.app import request, words
from dreamfusion_fast.app.jobs import COMMAND, Jobs
from dreamfusion_fast.app.runs import Run
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.io import write_bytes
from dreamfusion_fast.training.presets import preset_names

_log = logging.getLogger(__name__)

REFRESH = 0.5  # seconds
_CACHE = (600, 7200)  # seconds between two looks, and after which a copy of a file is removed
# A grey pixel, which stands for a run without pictures.
_BLANK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAAAAADRSSBWAAAAC0lEQVR42mN8yAAAAcgA4x8baXkAAAAASUVORK5CYII="
)
_LARGEST_SEED = 2**53 - 1  # that a browser has as a whole number
_LARGEST_MESH = 64 << 20  # bytes of one that is sent to be turned; a larger one can be downloaded


@dataclass(frozen=True)
class Seen:
    """The contents of a page, kept by the page itself as text, so that only changes are sent again.

    Attributes:
        name: of the run that is shown; empty: none is; None: nothing was sent yet.
        state: of that run.
        files: when its preview, mesh and turntable were written, ns; 0: it has none.
        names: of the runs below, in their order.
        gallery: a digest of their names, states and pictures.
    """

    name: str | None = None
    state: str = ""
    files: tuple[int, int, int] = (0, 0, 0)
    names: tuple[str, ...] = ()
    gallery: str = ""

    def to_text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of_text(cls, text: Any) -> Seen:
        """Read what `to_text` made. Anything else counts as a page that was sent nothing yet."""
        try:
            values: Any = json.loads(text)
            preview, mesh, turntable = values["files"]
            return cls(**values | {"files": (preview, mesh, turntable), "names": tuple(values["names"])})
        except (TypeError, ValueError, KeyError):
            return cls()


class Page:
    """Makes the page.

    Args:
        jobs: all of its users'.
        cache: a folder that what is shown is copied to, from where gradio hands it out.
        guidance: models to choose from besides those with a name.
        device: of the runs.
        command: that the command line's arguments come behind.
    """

    def __init__(
        self,
        jobs: Jobs,
        cache: Path,
        guidance: Sequence[str] = (),
        device: str = "auto",
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._jobs, self._cache, self._guidance, self._device = jobs, cache, list(guidance), device
        self._command, self._drawing = command, threading.Lock()

    def blocks(self) -> gr.Blocks:
        """The page, to be launched."""
        with gr.Blocks(
            title="dreamfusion_fast", analytics_enabled=False, delete_cache=_CACHE, fill_width=True
        ) as blocks:
            gr.Markdown("# dreamfusion_fast")
            seen = gr.Textbox("", visible="hidden", elem_id="seen")
            # The selected run. Only what selects one writes it: an answer that comes late changes nothing of it.
            kept = gr.BrowserState("", storage_key="dreamfusion-fast-run", secret="dreamfusion-fast")
            with gr.Row():
                with gr.Column(scale=2):
                    form, draw, make, drawn = self._form()
                with gr.Column(scale=3):
                    panel = gr.HTML(words.panel(None), elem_id="panel")
                    with gr.Row():
                        stop = gr.Button("Stop", interactive=False, elem_id="stop")
                        resume = gr.Button("Resume", interactive=False, elem_id="resume")
                        glb = gr.DownloadButton("Download mesh.glb", interactive=False, elem_id="glb")
                    with gr.Tabs(selected="preview") as tabs:
                        with gr.Tab("Preview", id="preview"):
                            preview = gr.Image(
                                show_label=False, interactive=False, height=320, elem_id="preview", buttons=[]
                            )
                        with gr.Tab("Mesh, to turn", id="mesh"):
                            mesh = gr.HTML(words.viewer(None), elem_id="mesh")
                        with gr.Tab("Turntable", id="turntable"):
                            video = gr.Video(
                                show_label=False,
                                interactive=False,
                                height=420,
                                loop=True,
                                elem_id="video",
                            )
            gr.Markdown("## Queue")
            queue = gr.HTML(words.queue([], []), elem_id="queue")
            gr.Markdown("## Runs")
            gallery = gr.Gallery(
                show_label=False, columns=5, height="auto", allow_preview=False, interactive=False, elem_id="runs",
                object_fit="contain", buttons=[],
            )  # fmt: skip
            parts = [seen, panel, queue, stop, resume, tabs, preview, mesh, glb, video, gallery]
            # Without gradio's own queue answers come sooner, but errors are not shown.
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
            blocks.load(self._opened, [kept], [kept, *parts], queue=False, **quiet)
            gr.Timer(REFRESH).tick(self._answer, [kept, seen], parts, trigger_mode="once", queue=False, **quiet)
            make.click(self._asked, [seen, *form], [kept, *parts], **quiet)
            gallery.select(self._selected, [kept, seen], [kept, *parts], **quiet)
            stop.click(self._stopped, [kept, seen], parts, **quiet)
            resume.click(self._resumed, [kept, seen], parts, **quiet)
            draw.click(
                self._drawn, [form[0], form[4]], [drawn], concurrency_limit=None, api_visibility="private",
                show_progress="full",
            )  # fmt: skip
        return blocks

    def _form(self) -> tuple[list[Any], gr.Button, gr.Button, gr.Image]:
        prompt = gr.Textbox(
            label="Prompt", placeholder="an armchair", max_length=request.LONGEST_PROMPT, lines=2, elem_id="prompt"
        )
        with gr.Row():
            preset = gr.Dropdown([("none", ""), *preset_names()], value="", label="Preset", elem_id="preset")
            guidance = gr.Dropdown(
                [("default", ""), *request.guidance_names(self._guidance)],
                value="", label="Diffusion model", elem_id="guidance",
            )  # fmt: skip
        with gr.Row():
            scale = gr.Textbox(
                label="Guidance scale", placeholder="the method's", max_length=20, elem_id="scale", min_width=90
            )
            seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, maximum=_LARGEST_SEED, elem_id="seed", min_width=90
            )
            steps = gr.Textbox(label="Steps", placeholder="the model's", max_length=20, elem_id="steps", min_width=90)
        with gr.Row():
            draw = gr.Button("Pictures first", elem_id="draw")
            make = gr.Button("Make it", variant="primary", elem_id="make")
        drawn = gr.Image(
            label="What the embedded prior draws",
            interactive=False,
            height=280,
            elem_id="drawn",
            buttons=[],
        )
        return [prompt, preset, guidance, scale, seed, steps], draw, make, drawn

    # What each event answers: a value per part, in the order of `parts`; the selected run before them, if it changes.

    def _opened(self, kept: Any) -> list[Any]:
        """A page was opened: it shows what it showed last, else what runs."""
        runs = self._jobs.all()
        running = next((run.name for run in runs if run.state in ("starting", "running")), "")
        name = kept if kept in {run.name for run in runs} else running
        return [name, *self._answer(name, "")]

    def _asked(self, seen: Any, *form: Any) -> list[Any]:
        with _told():
            prompt, preset, guidance, scale, seed, steps = form
            config = request.config_of(
                prompt, preset or None, guidance or None, scale, seed, steps, own=self._guidance, device=self._device
            )
            name = self._jobs.submit(config)
        return [name, *self._answer(name, seen)]

    def _selected(self, kept: Any, seen: Any, event: gr.SelectData) -> list[Any]:
        names = Seen.of_text(seen).names
        name = names[event.index] if isinstance(event.index, int) and 0 <= event.index < len(names) else kept
        return [name, *self._answer(name, seen)]

    def _stopped(self, kept: Any, seen: Any) -> list[Any]:
        with _told():
            self._jobs.stop(kept)
        return self._answer(kept, seen)

    def _resumed(self, kept: Any, seen: Any) -> list[Any]:
        with _told():
            self._jobs.resume(kept)
        return self._answer(kept, seen)

    def _drawn(self, prompt: Any, seed: Any) -> str:
        with _told(), self._drawing:  # one after the other: each takes all cores
            path = self._cache / "drawn.png"
            request.pictures_of(prompt, seed, path, self._device, self._command)
            return self._handed_out(path.read_bytes(), path.name)

    def _answer(self, kept: Any, seen: Any) -> list[Any]:
        """The values of all parts for a page that shows `seen` and is to show the run called `kept`."""
        runs = self._jobs.all()
        places = [self._jobs.place(run.name) for run in runs]
        index = next((index for index, run in enumerate(runs) if run.name == kept), None)
        run, place = (None, 0) if index is None else (runs[index], places[index])
        old, now = Seen.of_text(seen), self._shown(run, runs)
        return [now.to_text(), words.panel(run, place), words.queue(runs, places), *self._changes(old, now, run, runs)]

    def _shown(self, run: Run | None, runs: Sequence[Run]) -> Seen:
        names = tuple(each.name for each in runs)
        pictures = repr([(each.name, each.state, self._written(each, "preview")) for each in runs])
        gallery = hashlib.sha256(pictures.encode()).hexdigest()[:16]
        if run is None:
            return Seen("", names=names, gallery=gallery)
        files = self._written(run, "preview", True), self._written(run, "mesh"), self._written(run, "turntable")
        return Seen(run.name, run.state, files, names, gallery)

    def _changes(self, old: Seen, now: Seen, run: Run | None, runs: Sequence[Run]) -> list[Any]:
        """The values of the parts that are sent only where they have changed."""
        name, anew = now.name or "", now.name != old.name
        stop = resume = tabs = preview = viewer = glb = video = gr.skip()
        if anew or now.state != old.state:
            stop = gr.Button(interactive=now.state in ("waiting", "starting", "running"))
            resume = gr.Button(interactive=now.state in ("stopped", "failed"))
            tabs = gr.Tabs(selected="mesh" if now.state == "done" else "preview")
        changed = [anew or new != was for new, was in zip(now.files, old.files, strict=True)]
        if changed[0]:
            preview = self._copy(name, "preview") if now.files[0] else None
        if changed[1]:
            mesh = self._copy(name, "mesh") if now.files[1] else None
            glb = gr.DownloadButton(value=mesh, interactive=mesh is not None)
            viewer = self._viewer(run, mesh)
        if changed[2]:
            video = self._copy(name, "turntable") if now.files[2] else None
        pictures = gr.skip() if now.gallery == old.gallery else [self._picture(each) for each in runs]
        return [stop, resume, tabs, preview, viewer, glb, video, pictures]

    def _viewer(self, run: Run | None, mesh: str | None) -> str:
        """The page of `dreamfusion-fast view` that shows a mesh and needs nothing else."""
        if run is None or mesh is None:
            return words.viewer(None)
        path = Path(mesh)
        if path.stat().st_size > _LARGEST_MESH:
            return words.viewer(None, "too large to be shown here; download it")
        try:
            return words.viewer(view.page(run.prompt, path.read_bytes()))
        except (OSError, UserError) as error:
            return words.viewer(None, str(error))

    def _written(self, run: Run, kind: Any, live: bool = False) -> int:
        """When a file was written, ns; 0: there is none, or the run goes on and may yet change it, unless `live`."""
        if not run.is_over and not live:
            return 0
        with contextlib.suppress(UserError, OSError):
            path = self._jobs.runs.file(run.name, kind)
            return 0 if path is None else path.stat().st_mtime_ns
        return 0

    def _copy(self, name: str, kind: Any) -> str | None:
        """A copy of a run's file that gradio hands out; None where there is none. The runs' own files it never does."""
        with contextlib.suppress(UserError, OSError):
            path = self._jobs.runs.file(name, kind)
            return None if path is None else self._handed_out(path.read_bytes(), path.name)
        return None

    def _handed_out(self, data: bytes, name: str) -> str:
        """A file for gradio to hand out, where it looks for one of this content. It is never written twice."""
        folder = self._cache / hash_bytes(data)
        folder.mkdir(exist_ok=True)
        if not (folder / name).exists():
            write_bytes(folder / name, data, durable=False)
        return str(folder / name)

    def _picture(self, run: Run) -> tuple[Any, str]:
        return self._copy(run.name, "preview") or self._handed_out(_BLANK, "blank.png"), words.caption(run)


@contextlib.contextmanager
def _told() -> Any:
    """Errors of a person are shown to that person; what else goes wrong is logged, and said to be so."""
    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error
    except Exception as error:
        _log.exception("a page's request failed")
        raise gr.Error("Something went wrong; the server's log has more.", print_exception=False) from error
