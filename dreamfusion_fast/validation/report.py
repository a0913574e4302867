"""The result of a validation: checks, what was expected of them and why, and one page that shows them."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One measured number and the range that it is expected in.

    Attributes:
        name: what was measured.
        value: the number.
        low, high: the range, ends included; None: open.
        unit: such as "ms"; may be empty.
        why: where the expectation comes from.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    unit: str
    why: str

    @property
    def as_expected(self) -> bool:
        """Whether the value is in the range; a NaN is in none."""
        if not math.isfinite(self.value):
            return False
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)

    @property
    def expected(self) -> str:
        """The range in words."""
        if self.low is not None and self.high is not None:
            return f"{self.low:.4g} to {self.high:.4g}"
        if self.high is not None:
            return f"at most {self.high:.4g}"
        return "any" if self.low is None else f"at least {self.low:.4g}"

    def __str__(self) -> str:
        mark = "ok" if self.as_expected else "NOT AS EXPECTED"
        return f"{self.name}: {self.value:.4g}{self.unit and ' '}{self.unit} (want {self.expected}): {mark}"


@dataclass
class Report:
    """All that a validation found.

    Attributes:
        facts: of the model, the machine and the versions, by name.
        checks: in the order in which they were made.
        curves: name -> values over the steps, such as the residual.
        pictures: name -> PNG bytes.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)

    @property
    def failures(self) -> list[Check]:
        """The checks whose values are not as expected."""
        return [check for check in self.checks if not check.as_expected]

    def summary(self) -> str:
        """One line."""
        return f"{len(self.checks) - len(self.failures)} of {len(self.checks)} checks as expected"

    def to_json(self) -> str:
        """Facts, checks and curves; the pictures are in the page."""
        checks = [
            dataclasses.asdict(check) | {"as_expected": check.as_expected, "value": _finite(check.value)}
            for check in self.checks
        ]
        curves = {name: [_finite(value) for value in values] for name, values in self.curves.items()}
        return json.dumps({"facts": self.facts, "checks": checks, "curves": curves}, indent=1, allow_nan=False)

    def to_html(self) -> str:
        """One page that needs no other file and no network."""
        title = f"{self.facts.get('model', 'model')}: {self.summary()}"
        rows = [
            (check.name, f"{check.value:.4g} {check.unit}".strip(), check.expected, check.why, check.as_expected)
            for check in self.checks
        ]
        pictures = "".join(
            f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
            for name, data in self.pictures.items()
        )
        curves = "".join(
            f"<figure>{_curve(values)}<figcaption>{html.escape(name)}</figcaption></figure>"
            for name, values in self.curves.items()
            if len(values) > 1
        )
        return _PAGE.format(
            title=html.escape(title),
            facts=_facts(self.facts),
            rows="".join(_row(row) for row in rows),
            pictures=pictures,
            curves=curves,
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _row(row: tuple[str, str, str, str, bool]) -> str:
    *texts, good = row
    cells = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
    return (
        f'<tr class="{"good" if good else "bad"}"><td>{"as expected" if good else "not as expected"}</td>{cells}</tr>'
    )


def _facts(facts: Mapping[str, Any]) -> str:
    return "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items())


def _curve(values: Sequence[float]) -> str:
    """A line as SVG, its largest and least value beside it."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "<p>no finite value</p>"
    low, high = min(finite), max(finite)
    width, height, span = 420.0, 120.0, (high - low) or 1.0
    points = " ".join(
        f"{width * index / (len(values) - 1):.1f},{height * (1 - (value - low) / span):.1f}"
        for index, value in enumerate(values)
        if math.isfinite(value)
    )
    return (
        f'<svg viewBox="-4 -16 {width + 8:.0f} {height + 36:.0f}" role="img"><polyline points="{points}"/>'
        f'<text x="0" y="-4">{high:.4g}</text><text x="0" y="{height + 16:.0f}">{low:.4g}</text></svg>'
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid #d5d9de; }}
tr.good td:first-child {{ color: #17692d; }} tr.bad td:first-child {{ color: #b3261e; font-weight: 600; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }}
dt {{ color: #5b6470; }} dd {{ margin: 0; }}
figure {{ display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; }} figcaption {{ color: #5b6470; }}
img {{ max-width: 100%; image-rendering: auto; }} svg {{ width: 428px; max-width: 100%; }}
polyline {{ fill: none; stroke: #2457c5; stroke-width: 1.5; }} text {{ font-size: 12px; fill: #5b6470; }}
</style>
<h1>{title}</h1>
<dl>{facts}</dl>
<table><thead><tr><th></th><th>check</th><th>value</th><th>expected</th><th>why</th></tr></thead>
<tbody>{rows}</tbody></table>
<h2>Pictures</h2>{pictures}
<h2>Over the steps</h2>{curves}
</html>
"""
