"""`validate` says of a model that works that it does, and of one that does not, what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.cli import main
from dreamfusion_fast.guidance import DiffusionModel, GuidanceConfig, PromptEmbeddings, Views
from dreamfusion_fast.guidance.models.embedded.guide import EmbeddedPrior
from dreamfusion_fast.guidance.models.schedule import VariancePreserving
from dreamfusion_fast.guidance.prompts import Prompt
from dreamfusion_fast.validation import run
from dreamfusion_fast.validation.config import ValidateConfig
from dreamfusion_fast.validation.measures import colour_statistics, denoising_errors, place_of_first
from dreamfusion_fast.validation.report import Check, Report
from dreamfusion_fast.validation.run import validate
from dreamfusion_fast.validation.sampling import draw


class Gaussian(DiffusionModel):
    """The exact model of independent normal pixels, of a mean that the text says and standard deviation `spread`."""

    name, image_size, default_guidance_scale, text_identity = "gaussian", 8, 1.0, "gaussian"

    def __init__(self, spread: float, kind: Any = "epsilon") -> None:
        self.device, self.spread = torch.device("cpu"), spread
        self.schedule = VariancePreserving(torch.linspace(0.9999, 1e-4, 200, dtype=torch.float64), kind)

    def embed_texts(self, texts: list[Prompt]) -> dict[str, Tensor]:
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    def predict(self, noisy: Tensor, t: Tensor, condition: Mapping[str, Tensor], views: Views) -> Tensor:
        mean = condition["mean"].view(-1, 1, 1, 1).to(noisy)
        times = len(mean) // len(noisy)
        level = self.schedule.at(t, noisy.dtype)
        alpha, sigma, x = (part.repeat(times, 1, 1, 1) for part in (level.alpha, level.sigma, noisy))
        variance = alpha**2 * self.spread**2 + sigma**2
        noise = sigma * (x - alpha * mean) / variance
        clean = mean + alpha * self.spread**2 * (x - alpha * mean) / variance
        return noise if self.schedule.prediction_type == "epsilon" else alpha * noise - sigma * clean


def embeddings(*means: float) -> PromptEmbeddings:
    """Of four views of one mean, and a null of another."""
    return PromptEmbeddings({"mean": torch.tensor([[means[0]]] * 4 + [[means[-1]]])})


VIEWS = Views(torch.zeros(50), torch.zeros(50))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_pictures_are_drawn_from_the_model_s_distribution(kind: Any) -> None:
    def drawn(scale: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        given = Gaussian(0.3, kind), embeddings(0.4, -0.2), VIEWS, (3, 8, 8)
        return draw(*given, scale=scale, steps=199, generator=generator)

    plain = drawn(1.0)
    assert plain.shape == (50, 3, 8, 8)
    assert float(plain.mean()) == pytest.approx(0.4, abs=0.02)
    assert float(plain.std()) == pytest.approx(0.3, rel=0.05)
    # By guidance of scale 3, the mean is that of null + 3 (text - null).
    assert float(drawn(3.0).mean()) == pytest.approx(-0.2 + 3 * 0.6, abs=0.05)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_errors_are_the_known_ones(fraction: float) -> None:
    """The exact model's error is alpha^2 s^2 / (alpha^2 s^2 + sigma^2), in units of the best linear guess."""
    model, spread = Gaussian(0.3), 0.3
    clean = torch.randn(50, 3, 8, 8, dtype=torch.float64) * spread + 0.4
    views = Views(torch.zeros(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64))
    own, other = embeddings(0.4, 0.0), embeddings(-0.5, 0.0)
    prompts = [(own, "text"), (other, "text"), (own, "null")]
    errors = denoising_errors(model, prompts, clean, views, fraction, torch.Generator().manual_seed(1))
    level = model.schedule.at(torch.tensor([round(fraction * 200)]), torch.float64)
    alpha2, sigma2 = float(level.alpha**2), float(level.sigma**2)
    variance, power = spread**2, float(clean.square().mean())
    linear = alpha2 * power / (alpha2 * power + sigma2)
    exact = alpha2 * variance / (alpha2 * variance + sigma2)
    assert errors[0] == pytest.approx(exact / linear, rel=0.05)
    # A wrong mean m adds sigma^2 alpha^2 (mean - m)^2 / (alpha^2 s^2 + sigma^2)^2.
    for error, mean in zip(errors[1:], (-0.5, 0.0), strict=True):
        added = sigma2 * alpha2 * (0.4 - mean) ** 2 / (alpha2 * variance + sigma2) ** 2
        assert error == pytest.approx((exact + added) / linear, rel=0.05)
    assert place_of_first([errors]) == 1
    assert place_of_first([errors[::-1]]) == 2


def test_colours_are_those_of_the_object() -> None:
    images, opacity = torch.ones(2, 4, 4, 3), torch.zeros(2, 4, 4)
    images[0, :2] = torch.tensor([1.0, 0.5, 0.25])
    opacity[0, :2] = 1.0
    found = colour_statistics(images, opacity)
    assert found == {
        "covered": 0.25,
        "saturated": pytest.approx(1 / 3),
        "colourfulness": 0.75,
        "contrast": pytest.approx(0.0, abs=1e-6),
    }
    nothing = colour_statistics(images, torch.zeros(2, 4, 4))
    assert nothing["covered"] == 0.0
    assert all(math.isnan(nothing[name]) for name in ("saturated", "colourfulness", "contrast"))


@pytest.mark.parametrize(
    ("value", "low", "high", "good", "expected"),
    [
        (1.0, 0.5, 2.0, True, "0.5 to 2"),
        (2.5, 0.5, 2.0, False, "0.5 to 2"),
        (2.5, None, 2.0, False, "at most 2"),
        (0.1, 0.5, None, False, "at least 0.5"),
        (5.0, None, None, True, "any"),
        (float("nan"), None, None, False, "any"),
    ],
)
def test_a_check(value: float, low: float | None, high: float | None, good: bool, expected: str) -> None:
    check = Check("size", value, low, high, "m", "because")
    assert (check.as_expected, check.expected) == (good, expected)
    assert str(check).startswith("size: ")
    assert ("NOT AS EXPECTED" in str(check)) is not good


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.rows: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.sources += [str(values[name]) for name in ("src", "href") if name in values]
        if tag == "tr" and "class" in values:
            self.rows.append(str(values["class"]))


def test_the_page_needs_nothing_else_and_runs_nothing() -> None:
    report = Report(facts={"model": "<script>alert(1)</script>"}, curves={"a": [1.0, float("nan"), 3.0]})
    report.checks = [Check("<b>", 1.0, 0.0, 2.0, "", "<i>"), Check("worse", float("inf"), 0.0, 2.0, "ms", "")]
    report.pictures = {"drawn": b"\x89PNG"}
    page, tags = report.to_html(), _Tags()
    tags.feed(page)
    assert [source.split(",")[0] for source in tags.sources] == ["data:image/png;base64"]
    assert tags.rows == ["good", "bad"]
    assert "<script" not in page
    assert "<b>" not in page
    saved = json.loads(report.to_json())
    assert [check["as_expected"] for check in saved["checks"]] == [True, False]
    assert saved["checks"][1]["value"] is None
    assert saved["curves"]["a"] == [1.0, None, 3.0]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> ValidateConfig:
    """A validation of the embedded prior that takes seconds."""
    monkeypatch.setattr(run, "_LEVELS", (0.6,))
    monkeypatch.setattr(run, "_AZIMUTHS_DEG", (0.0, 180.0))
    return ValidateConfig(steps=2, picture_steps=6, device="cpu")


def test_a_model_that_works(short: ValidateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded prior, by the command line."""
    options = ["--steps", str(short.steps), "--picture-steps", str(short.picture_steps), "--device", "cpu"]
    arguments = ["validate", *options, "--out", str(tmp_path / "v")]
    code = main(arguments)
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "v" / "validation.json").read_text())
    failed = {check["name"] for check in saved["checks"] if not check["as_expected"]}
    assert failed <= {"place of the prompt, renders", "contrast of the object"}  # of a run of two steps
    assert code == bool(failed)
    assert len(saved["checks"]) > 12
    assert len(saved["curves"]["residual, eps_hat - eps"]) == 2
    assert f"of {len(saved['checks'])} checks as expected; done: {tmp_path}/v/index.html" in printed
    assert (tmp_path / "v" / "index.html").read_text().count("data:image/png;base64") == 3
    assert main(arguments) == 2
    assert "exists; choose another folder with --out, or give --overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_whose_output_is_read_as_another_quantity(
    short: ValidateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where scheduler_config.json has lost its prediction_type."""
    before = EmbeddedPrior.__init__

    def wrong(self: EmbeddedPrior, *arguments: Any, **options: Any) -> None:
        before(self, *arguments, **options)
        assert isinstance(self.schedule, VariancePreserving)
        self.schedule = VariancePreserving(self.schedule.alphas_cumprod, "epsilon")

    monkeypatch.setattr(EmbeddedPrior, "__init__", wrong)
    failed = {check.name for check in validate(short).failures}
    assert any(name.startswith("error of the noise told in pictures of its own") for name in failed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_random_weights_are_found_out(short: ValidateConfig, pipeline: Callable[[str], Path], kind: str) -> None:
    config = ValidateConfig(
        guidance=GuidanceConfig(name=str(pipeline(kind)), dtype="float32", cache=False),
        prompt="a red teapot",
        steps=2,
        picture_steps=2,
        device="cpu",
    )
    checks = {check.name: check for check in validate(config).checks}
    error = checks["error of the noise told in pictures of its own, t = 0.6"]
    assert not error.as_expected
    assert error.value > 0.9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--steps", "1"], "--steps: got 1, want 2 to 100000"),
        (["--memory", "lots"], "memory"),
        (["--guidance.name", "nosuch"], "unknown guidance 'nosuch'"),
        (["--device", "tpu"], "unknown device"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", "--out", str(tmp_path / "v"), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "v" / "index.html").exists()
