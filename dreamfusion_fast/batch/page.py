"""`index.html` of a batch: a table with pictures, whose links stay right where the folder is moved."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from dreamfusion_fast.batch.jobs import Job
from dreamfusion_fast.batch.outcome import LOG, Outcome
from dreamfusion_fast.export.agreement import Agreement
from dreamfusion_fast.io import RunFolder, write_text

FILE = "index.html"


def write_page(out: Path, jobs: Sequence[Job], outcomes: Mapping[str, Outcome]) -> None:
    """Write the page of a batch as it is now, whole or not at all.

    Args:
        out: the batch's folder.
        jobs: all of them, in the order of the table.
        outcomes: of those that have ended, by name.
    """
    failed = sum(outcome.error is not None for outcome in outcomes.values())
    title = f"{len(outcomes) - failed} of {len(jobs)} done" + (f", {failed} failed" if failed else "")
    rows = "".join(_row(out, job, outcomes.get(job.name)) for job in jobs)
    write_text(out / FILE, _PAGE.format(title=html.escape(title), rows=rows))


def _row(out: Path, job: Job, outcome: Outcome | None) -> str:
    folder = RunFolder(out / job.name)
    links = [
        f'<a href="{_address(out, path)}">{html.escape(path.name)}</a>'
        for path in (folder.mesh, folder.turntable, folder.config, folder.path / LOG)
        if path.is_file()
    ]
    picture = ""
    if folder.preview.is_file():
        picture = f'<img loading="lazy" alt="{html.escape(job.config.prompt)}" src="{_address(out, folder.preview)}">'
    if outcome is None:
        kind, said = "open", "not yet"
    elif outcome.error is not None:
        kind, said = "bad", f"failed: {outcome.error}"
    else:
        low = outcome.iou < Agreement.LOW
        kind = "low" if low else "good"
        said = f"done in {outcome.seconds:.0f} s, {outcome.faces} faces, mesh and render agree to {outcome.iou:.2f}"
    c = job.config
    cells = [c.prompt, str(c.seed), c.guidance.name, said]
    return (
        f'<tr class="{kind}"><td>{job.line}</td><td>{picture}</td>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + f"<td>{'<br>'.join(links)}</td></tr>\n"
    )


def _address(out: Path, path: Path) -> str:
    return html.escape("./" + quote(path.relative_to(out).as_posix()))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid #d5d9de; }}
td {{ overflow-wrap: anywhere; }} td:nth-child(7) {{ white-space: nowrap; }}
img {{ width: 32rem; max-width: 45vw; }}
tr.good td:nth-child(6) {{ color: #17692d; }} tr.low td:nth-child(6) {{ color: #8a5a00; }}
tr.bad td:nth-child(6) {{ color: #b3261e; font-weight: 600; }} tr.open td:nth-child(6) {{ color: #5b6470; }}
</style>
<h1>{title}</h1>
<table><thead><tr><th>line</th><th></th><th>prompt</th><th>seed</th><th>guidance</th><th>outcome</th><th>files</th></tr>
</thead><tbody>
{rows}</tbody></table>
</html>
"""
