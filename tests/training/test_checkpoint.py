"""Checkpoints come back as they were, or not at all and with the reason."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.training.checkpoint import (
    flatten_optimizer,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from dreamfusion_fast.training.config import Config


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    base = torch.arange(2046, dtype=torch.float32)
    tensors = {
        "field.table": base.view(1023, 2),
        "field.transposed": base.view(1023, 2).t(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "rng": torch.Generator().manual_seed(3).get_state(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7, dtype=torch.int64),
    }
    config = Config(prompt="a chair")
    save_checkpoint(path, tensors=tensors, config=config, step=113, meta={"rate": 2.5, "list": [1, 2]})
    return path, tensors, config


def test_round_trip(saved):
    path, tensors, config = saved
    checkpoint = load_checkpoint(path, config)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert checkpoint.tensors[name].dtype == value.dtype
        assert torch.equal(checkpoint.tensors[name], value)
    assert (checkpoint.config, checkpoint.step, checkpoint.meta) == (config, 113, {"rate": 2.5, "list": [1, 2]})
    assert set(checkpoint.group("field")) == {"table", "transposed"}
    assert os.listdir(path.parent) == [path.name]


def test_one_of_a_version_whose_guidance_had_a_range_of_timesteps(tmp_path, monkeypatch):
    config = Config(prompt="a chair")
    old = config.to_yaml().replace("guidance:\n", "guidance:\n  t_range: [0.02, 0.98]\n")
    monkeypatch.setattr(Config, "to_yaml", lambda self: old)
    save_checkpoint(tmp_path / "x.safetensors", tensors={}, config=config, step=1)
    assert load_checkpoint(tmp_path / "x.safetensors", config).config == config


def test_failed_save_keeps_the_old_file(saved):
    path, _, config = saved
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(path, tensors={}, config=config, step=1, meta={"x": object()})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_one_that_is_replaced_while_it_is_read_is_the_old_or_the_new(tmp_path):
    """safetensors' reader opens the path twice, and mixed two files in 1,707 of 20,000 readings."""
    path, fresh, config = tmp_path / "c.safetensors", tmp_path / "fresh", Config(prompt="a chair")
    contents = []
    for step in (1, 2):
        save_checkpoint(path, tensors={"a": torch.full((113,), float(step))}, config=config, step=step)
        contents.append(path.read_bytes())
    done = threading.Event()

    def replace():
        for content in itertools.cycle(contents):
            if done.is_set():
                return
            fresh.write_bytes(content)
            os.replace(fresh, path)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        seen = [load_checkpoint(path) for _ in range(100)]
    finally:
        done.set()
        writer.join()
    assert all((checkpoint.tensors["a"] == checkpoint.step).all() for checkpoint in seen)
    assert {checkpoint.step for checkpoint in seen} == {1, 2}


def test_absent(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated(saved, keep):
    path, _, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="is corrupt") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_one_flipped_bit(saved):
    path, _, _ = saved
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        load_checkpoint(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("not a checkpoint at all, only text that is long enough")
    with pytest.raises(UserError, match="is corrupt"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="no checkpoint of dreamfusion_fast"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(3)}, path, metadata={"format": "dreamfusion_fast checkpoint", "version": "99"})
    with pytest.raises(UserError, match="has format 99"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(3)}, path, metadata={"format": "dreamfusion_fast checkpoint", "version": "1"})
    with pytest.raises(UserError, match="bad metadata"):
        load_checkpoint(path)


def test_other_architecture_is_named(saved):
    path, _, config = saved
    changed = dataclasses.replace(config, field=dataclasses.replace(config.field, levels=config.field.levels + 1))
    with pytest.raises(UserError, match=rf"field\.levels: {config.field.levels}, here {config.field.levels + 1}"):
        load_checkpoint(path, changed)
    for part, name in (("background", "hidden"), ("background", "frequencies"), ("occupancy", "resolution")):
        number = getattr(getattr(config, part), name)
        other = dataclasses.replace(getattr(config, part), **{name: 2 * number})
        with pytest.raises(UserError, match=rf"config \({part}\.{name}: {number}, here {2 * number}\)"):
            load_checkpoint(path, dataclasses.replace(config, **{part: other}))
    white = dataclasses.replace(config.background, white=0.0)
    load_checkpoint(path, dataclasses.replace(config, steps=9, prompt="other", background=white))


def _train(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((5, 3), 0.1 * (step + 1))).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_optimizer_continues_as_if_never_stopped(tmp_path, kind):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Linear(7, 1))
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {"betas": (0.8, 0.9)}
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}]
        return model, kind(groups, lr=0.02, **options)

    model, optimizer = make()
    _train(model, optimizer, 3)
    tensors, rest = flatten_optimizer(optimizer)
    path = tmp_path / "c.safetensors"
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    save_checkpoint(path, tensors={**weights, **tensors}, config=Config(prompt="x"), step=3, meta={"optimizer": rest})

    checkpoint = load_checkpoint(path)
    other, restored = make()
    other.load_state_dict(checkpoint.group("model"))
    restore_optimizer(restored, checkpoint.tensors, checkpoint.meta["optimizer"])
    assert restored.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    _train(model, optimizer, 3)
    _train(other, restored, 3)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_optimizer_of_other_shape_is_refused():
    first, second = torch.nn.Linear(3, 7), torch.nn.Linear(3, 8)
    optimizer = torch.optim.Adam(first.parameters())
    _train(first, optimizer, 1)
    tensors, rest = flatten_optimizer(optimizer)
    with pytest.raises(UserError, match=r"shape \[7, 3\], the parameter has \[8, 3\]"):
        restore_optimizer(torch.optim.Adam(second.parameters()), tensors, rest)
