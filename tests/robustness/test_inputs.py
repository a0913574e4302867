"""Hostile paths, YAML, prompts, cached embeddings and compressed files: one line each, at once."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from watching import watched

from dreamfusion_fast import cli
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig
from dreamfusion_fast.guidance.cache import EmbeddingCache, _digest
from dreamfusion_fast.guidance.models.embedded import quantize
from dreamfusion_fast.guidance.prompts import Prompt
from dreamfusion_fast.io import claimed, make_folder, open_run_folder, user_path
from dreamfusion_fast.training.config import Config

PATHS = ["a\0b", "a" * 300, "/".join(["a" * 200] * 30), "~nosuchuser/a", "~nosuchuser"]


def _one_line(error: pytest.ExceptionInfo[UserError]) -> None:
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "use",
    [
        lambda path: claimed(path).__enter__(),
        make_folder,
        open_run_folder,
        Config.load,
        lambda path: GuidanceConfig(name=path),
        lambda path: Config.for_guidance(path),
    ],
)
def test_paths_that_are_none(use: Callable[[str], object], path: str) -> None:
    with pytest.raises(UserError) as caught:
        use(path)
    _one_line(caught)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "a", "--out"],
        ["generate", "--resume"],
        ["generate", "a", "--config"],
        ["generate", "a", "--guidance.name"],
        ["export"],
        ["sample", "a", "--out"],
    ],
)
def test_paths_on_the_command_line(command: list[str], path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, path + ".png" if command[0] == "sample" else path]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1


def test_paths_within_what_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission bits do not bind root, so the system's answer is given here."""

    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", denied)
        with pytest.raises(UserError, match=r"folder '.*shut/a': Permission denied"):
            user_path(tmp_path / "shut" / "a", "output folder")


YAML = {
    "a date": "steps: 2020-99-99\n",
    "digits": f"steps: {'9' * 5000}\n",
    "brackets": "[" * 5000,
    "braces": "{a: " * 5000,
    "dashes": "- " * 5000 + "a",
    "aliases": "a: &a [x]\n"
    + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "loop": "a: &a [*a]\n",
    "merge": "a: &a {b: 1}\nc:\n  <<: *a\n",
    "python": "!!python/object/apply:os.system ['touch marker']\n",
    "no integer": "steps: !!int ''\n",
    "no time": "steps: !!timestamp x\n",
    "no float": "steps: !!float x\n",
    "no bool": "steps: !!bool x\n",
    "no bytes": "prompt: !!binary '*'\n",
    "key": "? [a, b]\n: c\n",
    "a list": "[1, 2]\n",
    "large": "prompt: " + "a" * 2**20,
    "large, in lists": "[" + "[]," * 2**18 + "]",
    "control": 'prompt: "\\0"\n',
    "surrogate": 'prompt: "\\ud800"\n',
    "escape": '"\\e[2J": 1\n',
    "unknown": f"{'a' * 1000}: 1\n",
    "infinite": "optim: {lr_table: .nan}\n",
    "huge": "optim: {lr_table: 1e999}\n",
    "nothing": "guidance: {name: null}\n",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_no_config(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(YAML[name], encoding="utf-8")
    with watched(tmp_path, seconds=5) as done, pytest.raises(UserError) as caught:
        Config.load(path)
    assert not done
    assert "\n" not in str(caught.value)
    assert not Path("marker").exists()


def test_a_config_of_our_own_is_within_the_limits(tmp_path: Path) -> None:
    config = Config(prompt="a" * 10_000)
    config.save(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml") == config


@pytest.mark.slow
def test_a_prompt_with_an_invalid_byte() -> None:
    for arguments in ([b"generate", b"a \xff chair"], [b"sample", b"a \xff chair"]):
        command = [sys.executable, "-m", "dreamfusion_fast.cli", *map(os.fsdecode, arguments)]
        done = subprocess.run(command, capture_output=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert b"got 'a \\udcff chair', want text without NUL and invalid characters" in done.stderr
        assert done.stderr.count(b"\n") == 1


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "DREAMFUSION_FAST_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    import pwd

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.warns(UserWarning, match="not kept: there is no home folder for a cache: set HOME or DREAMFUSION_FAST"):
        cache = EmbeddingCache()
    made = cache.get_or_compute("model", [Prompt("a")], lambda texts: {"hidden": torch.ones(1, 2)})
    assert torch.equal(made["hidden"], torch.ones(1, 2))


@pytest.mark.parametrize(
    "tensors",
    [
        {"hidden": torch.ones(3, 4)},
        {"hidden": torch.ones(2)},
        {"hidden": torch.tensor(1.0)},
        {"hidden": torch.ones(2, 4, dtype=torch.int64)},
        {},
    ],
)
def test_cached_embeddings_of_another_shape_are_made_again(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    def compute(texts: list[Prompt]) -> dict[str, torch.Tensor]:
        return {"hidden": torch.full((len(texts), 4), 5.0)}

    texts = [Prompt("a"), Prompt("b")]
    EmbeddingCache(tmp_path).get_or_compute("model", texts, compute)
    (entry,) = tmp_path.glob("*.safetensors")
    save_file(tensors, entry, metadata={"sha256": _digest(tensors)})
    with pytest.warns(UserWarning, match="are damaged and are made again"):
        made = EmbeddingCache(tmp_path).get_or_compute("model", texts, compute)
    assert torch.equal(made["hidden"], compute(texts)["hidden"])


def test_gzip_is_not_unpacked_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors.gz"
    quantize.save_weights(path, {"a": torch.ones(3)}, {"config": "{}"})
    assert quantize.load_weights(path)[0]["a"].tolist() == [1, 1, 1]
    monkeypatch.setattr(quantize, "_LARGEST_CONTENT", 2**20)
    path.write_bytes(gzip.compress(bytes(2**24)))
    with pytest.raises(ValueError, match="more than 1 MiB under gzip"):
        quantize.load_weights(path)
