"""The words of the page about runs: HTML in which everything that people wrote is text."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence

from dreamfusion_fast.app.runs import Run

_STAGES = {
    "loading": "loading the diffusion model",
    "steps": "step",
    "firm": "last stage, step",
    "export": "mesh and pictures, view",
    "done": "done",
}


def duration(seconds: float) -> str:
    """Such as 1:05 or 2:00:00."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def said(run: Run, place: int = 0, now: float | None = None) -> str:
    """One line, plain text, on what a run does.

    Args:
        run: the run.
        place: how many runs are before it in the queue.
        now: seconds since 1970; by default the time it is.
    """
    now = time.time() if now is None else now
    progress = run.progress
    if run.state == "waiting":
        return f"waiting, {place} before it" if place else "waiting, next"
    if run.state == "starting":
        return "starting"
    if run.state == "failed":
        return f"failed: {run.error}"
    if run.state == "done":
        return "done"
    counted = progress is not None and progress.total > 0
    where = f"{progress.done} of {progress.total}" if counted and progress is not None else ""
    if run.state == "stopped":
        in_steps = progress is not None and progress.stage == "steps"
        return f"stopped at step {where}; it can go on" if in_steps else "stopped; it can go on"
    if run.state == "stopping":
        return "stopping: it saves itself"
    if progress is None:
        return "running"
    if progress.stage == "done":
        return "ending"
    words = [f"{_STAGES[progress.stage]} {where}".strip()]
    if progress.rate:
        words.append(f"{progress.rate:.1f} a second")
    if progress.left is not None:
        left = max(0.0, progress.left - max(0.0, now - progress.written))
        words.append(f"{duration(left)} left" + (", then the mesh" if progress.stage == "steps" else ""))
    else:
        words.append(f"for {duration(now - progress.began)}")
    return " · ".join(words)


def panel(run: Run | None, place: int = 0) -> str:
    """The selected run: what it makes, what it does, how far it is."""
    if run is None:
        return '<div class="run empty">Nothing is selected: ask for something, or choose one of the runs below.</div>'
    progress = run.progress
    losses = ""
    if progress is not None and progress.losses and not run.is_over:
        losses = "  ".join(f"{name} {value:.3f}" for name, value in progress.losses.items())
    return (
        f'<div class="run {run.state}" data-name="{html.escape(run.name)}" data-state="{run.state}">'
        f"<h3>{html.escape(run.prompt)}</h3>{_bar(run)}"
        f'<div class="said">{html.escape(said(run, place))}</div>'
        f'<div class="small">{html.escape(losses) or html.escape(run.name)}</div></div>'
    )


def queue(runs: Sequence[Run], places: Sequence[int]) -> str:
    """All that goes on or waits, for everybody, and how many could go on.

    Args:
        runs: of which some may be over.
        places: of each of them, how many are before it.
    """
    rows = [
        f'<div class="row {run.state}"><b>{html.escape(run.prompt)}</b>{_bar(run)}'
        f"<span>{html.escape(said(run, place))}</span></div>"
        for place, run in sorted(
            ((place, run) for place, run in zip(places, runs, strict=True) if not run.is_over),
            key=lambda pair: (pair[1].state == "waiting", pair[0]),
        )
    ]
    cut = sum(run.state == "stopped" for run in runs)
    offer = f"<div>{cut} of the runs below {'was' if cut == 1 else 'were'} stopped; select one to resume it.</div>"
    return f'<div class="queue">{"".join(rows) or "The queue is empty."}{offer if cut else ""}</div>'


def viewer(page: str | None, why: str = "there is no mesh yet") -> str:
    """A page within the page, which can do nothing but show its mesh.

    Args:
        page: HTML of `view.page`.
        why: there is none.
    """
    if page is None:
        return f'<div class="viewer">{html.escape(why)}</div>'
    return f'<iframe class="viewer" title="mesh" sandbox="allow-scripts" srcdoc="{html.escape(page)}"></iframe>'


def caption(run: Run) -> str:
    """The line below a run's picture, plain text."""
    prompt = run.prompt if len(run.prompt) <= 60 else run.prompt[:57] + "..."
    return f"{run.state} · {prompt}"


def _bar(run: Run) -> str:
    if run.state == "waiting" or run.progress is None or run.state == "starting":
        value = ' value="0"' if run.state == "waiting" or run.is_over else ""
        return f"<progress{value}></progress>"
    if run.state == "done":
        return '<progress value="1" max="1"></progress>'
    if not run.progress.total:
        return "<progress></progress>" if not run.is_over else '<progress value="0"></progress>'
    return f'<progress value="{run.progress.done}" max="{run.progress.total}"></progress>'


STYLE = """
.run h3 { margin: 0 0 .4rem; overflow-wrap: anywhere; }
.run progress, .queue progress { width: 100%; height: .8rem; }
.run .said { font-variant-numeric: tabular-nums; }
.run .small { opacity: .7; font-size: .85rem; min-height: 1.3rem; white-space: pre-wrap; }
.run.failed .said { color: #b3261e; font-weight: 600; }
.queue .row { display: grid; grid-template-columns: minmax(6rem, 1fr) 8rem minmax(12rem, 2fr); gap: .8rem;
  align-items: center; font-variant-numeric: tabular-nums; }
.queue b { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#drawn img, #preview img { width: 100%; height: 100%; object-fit: contain; }
#runs img { width: 100%; height: 100%; }
.viewer { width: 100%; height: 27rem; border: 0; }
#runs .grid-wrap, #runs .gallery-container { height: auto; min-height: 0; }
#runs .grid-container { grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); }
#runs .thumbnail-item { aspect-ratio: 2; }
footer { display: none !important; }
"""
"""CSS of the page."""
