"""The embedded prior's recipe at tiny scale: groups of views, training that is cut and resumed, files, the probe."""

from __future__ import annotations

import copy
import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogues import write_catalogue
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import pack_prior
import train_prior
from prior_data import batches, probe
from prior_data.batches import HELD_OUT_VIEWS, Batch, CatalogueSampler, Parts
from training_state import PART_BYTES, load_state

from dreamfusion_fast.guidance.models.embedded.model import (
    CONDITION_WIDTH,
    PriorNetwork,
    ViewCondition,
    alphas_cumprod,
    load_prior,
)
from dreamfusion_fast.guidance.models.embedded.text_encoder import WEIGHTS

CPU = torch.device("cpu")
VIEWS_EACH = 26
TINY = ["--channels", "8", "8", "16", "--groups", "4", "--heads", "4", "--batch", "4", "--no-compile"]


class Words(torch.nn.Module):
    """Stands for the text encoder, which takes seconds: a number for each text."""

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        number = torch.tensor([float(sum(map(ord, text)) % 97) for text in texts]) / 97
        return number[:, None, None].expand(-1, 20, 384), number[:, None].expand(-1, 384)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_catalogue(tmp_path_factory.mktemp("data"), VIEWS_EACH)


@pytest.fixture(scope="module")
def sampler(data: Path) -> CatalogueSampler:
    return CatalogueSampler(data, Words(), CPU)


# Groups


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_groups_are_views_of_one_model(sampler: CatalogueSampler, group: int, held_out: bool) -> None:
    torch.manual_seed(0)
    model, view = sampler.draw_groups(60 * group, group, held_out)
    assert torch.equal(view // VIEWS_EACH, model)
    assert bool((model.view(-1, group) == model[::group, None]).all())
    last = VIEWS_EACH - HELD_OUT_VIEWS
    place = (view % VIEWS_EACH).view(-1, group)
    assert bool(((place[:, 0] >= last) == held_out).all())
    assert bool((place[:, 1:] < last).all())
    if group == 1:
        torch.manual_seed(0)
        alone = sampler.draw(60, held_out)
        assert torch.equal(torch.stack(alone), torch.stack((model, view)))


def test_groups_are_around_the_object(sampler: CatalogueSampler) -> None:
    """A quarter turn apart, and at one elevation, as far as there are views: 14 degrees are between neighbours here."""
    around = copy.copy(sampler)
    around.azimuth = (torch.arange(VIEWS_EACH) * (2 * math.pi / VIEWS_EACH)).repeat(2)
    around.elevation = (torch.arange(VIEWS_EACH) % 2).float().repeat(2)
    around._direction = batches._directions(around.azimuth, around.elevation)
    torch.manual_seed(0)
    _, view = around.draw_groups(400, 4)
    elevation, azimuth = around.elevation[view].view(-1, 4), around.azimuth[view].view(-1, 4)
    assert torch.equal(elevation, elevation[:, :1].expand_as(elevation))
    off = (azimuth[:, 1:] - azimuth[:, :1] - torch.arange(1, 4) * math.pi / 2).cos().clamp(max=1).acos()
    assert float(off.max()) < 0.8
    assert float(off.mean()) < 0.25
    assert len(azimuth[azimuth[:, 0] == 0].unique(dim=0)) > 1  # not always the same ones
    with pytest.raises(ValueError, match="batch: got 10, want a multiple of 4, the views of a group"):
        sampler.draw_groups(10, 4)


def test_a_group_shares_all_but_the_camera(sampler: CatalogueSampler) -> None:
    torch.manual_seed(1)
    parts = sampler.batch(240, 4).parts
    view = parts.view
    shared = {"phrase": parts.phrase, "word": parts.word, "null": parts.null, "named": parts.suffix > 0}
    for name in ("background", "shading", "camera_known", "background_known", "shading_known"):
        shared[name] = getattr(view, name)
    for name, value in shared.items():
        of_group = value.unflatten(0, (-1, 4))
        assert torch.equal(of_group, of_group[:, :1].expand_as(of_group)), name
        assert len(value.unique(dim=0)) > 1, name  # and groups differ
    assert view.azimuth is not None
    assert int((view.azimuth.view(-1, 4).diff(dim=1).abs() > 0.3).sum()) > 100
    assert len(parts.suffix.view(-1, 4)[:, 0].unique()) > 2


def test_colour_of_a_group_is_relative_to_all_of_it(sampler: CatalogueSampler) -> None:
    """A side in the shade stays darker than the others when it is recoloured."""
    albedo = torch.full((4, 3, 8, 8), 0.6)
    albedo[1] = 0.3
    alpha, red = torch.ones(4, 1, 8, 8), torch.tensor([3])
    both = sampler._recolour(albedo, alpha, red.expand(4))
    together = sampler._recolour(albedo, alpha, red)
    assert float(together[1, 1].mean() / together[0, 1].mean()) == pytest.approx(0.5, abs=1e-5)
    assert float(both[1, 1].mean() / both[0, 1].mean()) > 0.6
    assert torch.equal(together[0], together[2])


def test_loss_of_groups_has_one_timestep_each() -> None:
    told: list[Tensor] = []

    def network(noisy: Tensor, timestep: Tensor, tokens: Tensor, condition: Tensor) -> Tensor:
        told.extend((noisy, timestep))
        return torch.zeros_like(noisy)

    torch.manual_seed(0)
    empty = Parts(*(torch.zeros(12) for _ in range(4)), ViewCondition())
    batch = Batch(torch.zeros(12, 3, 64, 64), torch.zeros(12, 20, 384), torch.zeros(12, CONDITION_WIDTH), empty)
    abar = alphas_cumprod()
    loss, timestep = train_prior.v_loss(network, batch, abar, group=4)
    assert torch.equal(told[1], timestep)
    assert torch.equal(timestep.view(3, 4), timestep.view(3, 4)[:, :1].expand(3, 4))
    assert len(timestep.unique()) == 3
    assert len(told[0][:, 0, 0, 0].unique()) == 12  # a noise each
    # Of a black picture and no prediction, the loss is the mean square of the target.
    noise = told[0] / (1 - abar[timestep]).sqrt().view(-1, 1, 1, 1)
    expected = (abar[timestep].view(-1, 1, 1, 1).sqrt() * noise).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected * (timestep / 150).clamp(max=1))
    sums, counts = train_prior.reported(loss, timestep, 4)
    assert counts.tolist()[:3] == [12, 0, 12]
    torch.testing.assert_close(sums[0], loss.sum())
    torch.testing.assert_close(sums[3:].sum(), loss.sum())


class Across(torch.nn.Module):
    """Stands for the network, which takes long to compile."""

    def forward(self, x: Tensor, group: int = 1) -> Tensor:
        return x.reshape(len(x) // group, -1).softmax(1).view_as(x)


def test_groups_of_each_size_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each graph has its group as a constant: no size in it is symbolic."""
    torch._dynamo.reset()
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append([type(value) for value in inputs])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, dynamic: torch._dynamo.optimize(backend, dynamic=dynamic)(f))
    block = Across()
    called = {group: train_prior.grouped(block, group, compile=True) for group in (1, 2, 4)}
    given = torch.randn(4, 5)
    for group in (2, 1, 4, 1, 2, 4, 1, 2):
        torch.testing.assert_close(called[group](given), block(given, group))
    assert len(seen) == 3
    assert not any(kind in (int, torch.SymInt) for kinds in seen for kind in kinds)


# The script


def train(data: Path, out: Path, *options: str) -> None:
    train_prior.main(["--data", str(data), "--text-encoder", str(WEIGHTS), "--out", str(out), *TINY, *options])


@pytest.mark.slow
def test_a_run_that_is_cut_is_the_one_that_is_not(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit; with the files of its end, and weights that a run takes."""
    monkeypatch.setattr(batches, "TextEncoder", lambda _: Words())
    monkeypatch.setattr(probe, "PROBE_TIMES", (0.6,))
    length = ["--views", "4", "--total-steps", "5", "--save-every", "2"]
    looks, blind = (["--probe-views", views, "--sheet-steps", steps] for views, steps in (("8", "1"), ("0", "0")))
    monkeypatch.setattr(train_prior, "sample_sheet", functools.partial(probe.sample_sheet, prompts=("a chair",)))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(data, whole, *length, *looks, "--state", str(tmp_path / "state-whole"))
    for _ in range(3):
        train(data, cut, *length, *blind, "--state", str(tmp_path / "state-cut"), "--steps", "2")
    said = capsys.readouterr().out
    assert said.count("to be continued: ") == 2
    assert said.count("done: 5 steps") == 2
    states = [load_state(tmp_path / f"state-{name}") for name in ("whole", "cut")]
    assert states[0] is not None
    assert states[1] is not None
    for name, value in states[0]["network"].items():
        assert torch.equal(states[1]["network"][name], value), name
    assert all(map(torch.equal, states[0]["average"], states[1]["average"]))
    assert not torch.equal(states[0]["network"]["unet.conv_in.weight"], states[0]["average"][0])
    record = json.loads((whole / "training.json").read_text())
    assert record["config"]["views"] == 4
    assert record["steps"] == 5
    assert record["done"]
    assert {"alone", "grouped", "t 0.0", "t 0.9"} <= record["log"][-1].keys()
    groups = record["probe"]["groups"]
    assert {"other views of another object", "no other views", "own camera opposite", "no camera"} <= groups.keys()
    assert groups["no other views"]["t=0.6"] != groups["all right"]["t=0.6"]
    assert "no other views" not in record["probe"]["single views"]
    names = {path.name for path in whole.iterdir()}
    assert names == {"average-0.safetensors", "training.json", "samples.png", "samples-groups.png"}

    pack_prior.main([str(whole), "--weights", str(tmp_path / "prior")])
    packed = load_prior(tmp_path / "prior")
    assert packed.views == 4
    assert (tmp_path / "prior" / "tokenizer.json").is_file()
    # A training may start from them, and begins as they are, with other views, too.
    options = ["--init", str(tmp_path / "prior"), "--views", "2", "--total-steps", "1", "--batch", "4", "--no-compile"]
    args = ["--data", str(data), "--text-encoder", str(WEIGHTS), "--out", str(cut), *options]
    train_prior.main([*args, "--lr", "0", "--probe-views", "0", "--sheet-steps", "0"])
    pack_prior.main([str(cut), "--weights", str(tmp_path / "again")])
    again = load_prior(tmp_path / "again")
    assert again.views == 2
    for name, value in packed.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--views", "3"], "--batch: got 4, want a multiple of 3, the views of a group"),
        (["--views", "17"], "views: got 17, want a whole number from 1 to 16"),
        (["--init", str(WEIGHTS)], "--init: its weights have their own widths; omit --channels, --groups and --heads"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path, tmp_path / "out", *options)
    assert message in capsys.readouterr().err


def test_state_of_another_training_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(batches, "TextEncoder", lambda _: Words())
    short = ["--total-steps", "1", "--probe-views", "0", "--sheet-steps", "0", "--state", str(tmp_path / "state")]
    train(data, tmp_path / "out", *short)
    with pytest.raises(SystemExit):
        train(data, tmp_path / "out", *short, "--seed", "1")
    assert "--state: it was made with seed 0, got 1" in capsys.readouterr().err


def test_what_the_package_trains_can_be_carried() -> None:
    """Weights, record and sheets of a call in six files of at most 16 MiB; its whole state stays on the machine."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in PriorNetwork().parameters())
    assert count == 21_132_748
    assert math.ceil(2 * count / 15e6) <= 3
    # Weights and average in float32, two moments in bfloat16.
    assert math.ceil(12 * count / PART_BYTES) == 17
