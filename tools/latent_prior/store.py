"""Trained weights small enough for the repository, and the one way to trained networks, stored or just trained."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from training_state import load_state

from dreamfusion_fast.guidance.models.embedded.quantize import load_weights, save_weights

from .networks import Shape, make_autoencoder, make_unet
from .training import averaged_unet

STORED = Path(__file__).parent / "weights"
FILES = {"vae": "vae.safetensors.gz", "unet": "unet.safetensors.gz"}


@dataclasses.dataclass(frozen=True)
class Trained:
    """Trained networks, float32, on the CPU.

    Attributes:
        shape: of both.
        vae: `AutoencoderKL`.
        unet: `UNet2DConditionModel` with the averaged weights.
        factor: what the U-Net's latents are the autoencoder's latents times.
    """

    shape: Shape
    vae: Any
    unet: Any
    factor: float


def read_source(source: Path) -> Trained:
    """The files of a training, or those that `store` made of them.

    Args:
        source: `--out` of a training, or a folder that `store` wrote.

    Raises:
        ValueError: neither of them, a part of one, a file that is broken, or a training that has not come to the U-Net.
    """
    if any((source / file).exists() for file in FILES.values()):
        return _read_stored(source)
    if any(source.glob("state-*.part")):
        return _read_training(source)
    raise ValueError(
        f"source: {source} holds no state of a training (state-*.part) and no stored weights "
        f"({', '.join(FILES.values())})"
    )


def store(out: Path, folder: Path) -> dict[str, int]:
    """Write both networks of a training as int8 with a scale per row, widths and scaling factor beside each.

    Args:
        out: `--out` of the training.
        folder: to be written; files of an earlier call are replaced.

    Returns:
        Bytes of each network.

    Raises:
        ValueError: no state, or a training that has not come to the U-Net.
    """
    trained = _read_training(out)
    card = {"shape": dataclasses.asdict(trained.shape), "scaling_factor": trained.factor}
    metadata = {name: json.dumps(value) for name, value in card.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in FILES.items():
        save_weights(folder / file, getattr(trained, name).state_dict(), metadata)
    return {name: (folder / file).stat().st_size for name, file in FILES.items()}


def _read_training(out: Path) -> Trained:
    state = load_state(out)
    if state is None:
        raise ValueError(f"out: {out} holds no state of a training (state-*.part)")
    factor = state["results"].get("scaling_factor")
    if factor is None or state["phases"]["unet"][0] == 0:
        raise ValueError(f"out: the training in {out} has not come to the U-Net yet")
    *widths, groups, heads = state["identity"]["widths"]
    shape = Shape(tuple(widths[:3]), tuple(widths[3:]), groups, heads)
    vae, unet = make_autoencoder(shape), make_unet(shape)
    vae.load_state_dict({name: value.float() for name, value in state["vae"].items()})
    unet.load_state_dict(state["unet"])
    return Trained(shape, vae, averaged_unet(shape, unet, state["average"]), factor)


def _read_stored(folder: Path) -> Trained:
    makers = {"vae": make_autoencoder, "unet": make_unet}
    networks, cards = {}, []
    for name, file in FILES.items():
        try:
            weights, metadata = load_weights(folder / file)
            shape, factor = _read_card(metadata)
            networks[name] = makers[name](shape)
            networks[name].load_state_dict(weights)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"source: {folder / file} cannot be read ({why})") from error
        cards.append((shape, factor))
    if cards[0] != cards[1]:
        raise ValueError(f"source: {' and '.join(FILES.values())} in {folder} are of different trainings")
    return Trained(shape, networks["vae"], networks["unet"], factor)


def _read_card(metadata: dict[str, str]) -> tuple[Shape, float]:
    fields = json.loads(metadata["shape"])
    shape = Shape(tuple(fields["vae_channels"]), tuple(fields["unet_channels"]), fields["groups"], fields["heads"])
    factor = float(json.loads(metadata["scaling_factor"]))
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"scaling_factor must be positive and finite, got {factor}")
    return shape, factor
