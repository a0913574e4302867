"""Stored weights of the latent prior: what they hold, the folder made of them, and files that are broken."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

pytest.importorskip("diffusers")

import train_latent_prior
import training_state as state
from latent_prior import networks, pipeline, store

from dreamfusion_fast.guidance.models.embedded.quantize import load_weights, save_weights

CPU = torch.device("cpu")
TINY = networks.Shape((8, 8, 16), (8, 16, 16), groups=4)
FACTOR = 0.87654321
VAE, UNET = store.FILES.values()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state that a training leaves, of random weights, the average apart from the last step's."""
    out = tmp_path_factory.mktemp("out")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, unet = networks.make_autoencoder(TINY), networks.make_unet(TINY)
        average = [value + 0.01 * torch.randn_like(value) for value in unet.parameters()]
    left = {
        "identity": {"widths": [*TINY.vae_channels, *TINY.unet_channels, TINY.groups, TINY.heads], "seed": 0},
        "phases": {"autoencoder": (4, 1.0), "unet": (5, 1.0)},
        "results": {"scaling_factor": FACTOR},
        "vae": {name: value.half() for name, value in vae.state_dict().items()},
        "unet": unet.state_dict(),
        "average": [value.detach() for value in average],
    }
    state.save_state(out, left, 9)
    return out


@pytest.fixture(scope="module")
def weights(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "weights"
    train_latent_prior.main(["store", str(trained), "--weights", str(folder)])
    return folder


@pytest.mark.slow
def test_pack_of_the_stored_is_pack_of_the_training(trained: Path, weights: Path, tmp_path: Path) -> None:
    assert {path.name for path in weights.iterdir()} == {VAE, UNET}
    train_latent_prior.main(["pack", str(trained), "--folder", str(tmp_path / "a")])
    train_latent_prior.main(["pack", str(weights), "--folder", str(tmp_path / "b")])
    files = [sorted(path.relative_to(top) for path in top.rglob("*")) for top in (tmp_path / "a", tmp_path / "b")]
    assert files[0] == files[1]
    direct, through = (pipeline.Pipeline(tmp_path / name, CPU) for name in "ab")
    assert through.vae.config.scaling_factor == direct.vae.config.scaling_factor == FACTOR
    exact = store.read_source(trained)
    coarse = 0
    for name in ("vae", "unet"):
        configs = [{**getattr(made, name).config, "_name_or_path": ""} for made in (direct, through)]
        assert configs[0] == configs[1]
        found, packed = getattr(through, name).state_dict(), getattr(direct, name).state_dict()
        for key, value in getattr(exact, name).state_dict().items():
            if value.ndim < 2 or value.numel() < 4096:
                assert torch.equal(found[key], packed[key]), key
                continue
            largest = value.flatten(1).abs().amax(dim=1)
            error = (found[key] - packed[key]).flatten(1).abs().amax(dim=1)
            # Half a step of the row, and half a step of float16 on either side.
            assert bool((error <= largest / 254 + largest * 2**-10 + 1e-7).all()), key
            coarse += int(error.max() > largest.max() / 1000)
    assert coarse > 0


def test_storing_again_replaces(trained: Path, weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    (folder / VAE).write_bytes(b"old")
    assert store.store(trained, folder) == {
        "vae": (folder / VAE).stat().st_size,
        "unet": (folder / UNET).stat().st_size,
    }
    for file in (VAE, UNET):
        assert (folder / file).read_bytes() == (weights / file).read_bytes()


def rewrite(path: Path, **changes: str) -> None:
    tensors, metadata = load_weights(path)
    save_weights(path, tensors, metadata | changes)


def drop_a_tensor(path: Path) -> None:
    tensors, metadata = load_weights(path)
    save_weights(path, dict(list(tensors.items())[1:]), metadata)


@pytest.mark.quick(6)
@pytest.mark.parametrize("file", [VAE, UNET])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_bytes(b"rubbish"), "no whole safetensors file under gzip"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "no whole safetensors file under gzip"),
        (drop_a_tensor, "Missing key"),
        (lambda path: rewrite(path, scaling_factor="0"), "must be positive and finite, got 0"),
        (lambda path: rewrite(path, scaling_factor="[]"), "float"),
        (lambda path: rewrite(path, shape="{}"), "vae_channels"),
        (lambda path: rewrite(path, shape="3"), "'int'"),
        (
            lambda path: rewrite(path, shape=json.dumps(dataclasses.asdict(networks.Shape()))),
            "size mismatch|Missing key",
        ),
        (lambda path: save_weights(path, load_weights(path)[0], {}), "shape"),
        (lambda path: rewrite(path, scaling_factor="0.5"), "of different trainings"),
    ],
)
def test_broken_weights_are_named(
    weights: Path, tmp_path: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    damage(folder / file)
    with pytest.raises(ValueError, match=rf"^source: .*{file}.*({message})"):
        store.read_source(folder)


def test_shape_and_factor_lie_beside_each_network(weights: Path) -> None:
    for file in (VAE, UNET):
        shape, factor = store._read_card(load_weights(weights / file)[1])
        assert (shape, factor) == (TINY, FACTOR)


def test_missing_sources_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = ["--folder", str(tmp_path / "new")]
    wrong = [
        (["pack", str(tmp_path / "no"), *new], f"source: {tmp_path / 'no'} holds no state of a training"),
        (["store", str(tmp_path / "no"), "--weights", str(tmp_path)], f"out: {tmp_path / 'no'} holds no state"),
    ]
    for arguments, message in wrong:
        with pytest.raises(SystemExit):
            train_latent_prior.main(arguments)
        assert message in " ".join(capsys.readouterr().err.split()), arguments
    assert list(tmp_path.iterdir()) == []
