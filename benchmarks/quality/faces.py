"""Many faces: how often another side of an object looks like its front.

A small classifier tells front, side and back apart. It is trained for this alone, on models of the catalogue that have
a front, with others held out: on one half of those the threshold is set, on the other it is seen how far it holds.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quality import pictures
from quality.pictures import Layers, lit, turned_to_camera

FRONT, SIDE, BACK = range(3)
WEIGHTS = Path(__file__).with_name("faces.npz")
FALSE_FRONTS = 0.05
"""Share of the views of real models away from the front that may pass for it; the threshold follows from that."""
_LEAST_DIFFERENCE = 0.12
_CHANNELS = (24, 48, 80, 80)

_AZIMUTH = np.arange(pictures.FACE_VIEWS) * 360.0 / pictures.FACE_VIEWS
_AWAY = np.minimum(_AZIMUTH, 360 - _AZIMUTH)  # degrees from the front
AT_FRONT = _AWAY <= 30
ELSEWHERE = _AWAY >= 75
LABEL = np.select([AT_FRONT, (_AWAY >= 60) & (_AWAY <= 120), _AWAY >= 150], [FRONT, SIDE, BACK], -1)
"""Class of each of the views; -1: between two, and left out of the training."""


class ViewClassifier(nn.Module):
    """Logits [n, 3] of front, side and back from [n, 6, 64, 64]: see `inputs`."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 6
        for index, channels in enumerate(_CHANNELS):
            layers += [nn.Conv2d(before, channels, 3, 2 if index < 3 else 1, 1), nn.BatchNorm2d(channels), nn.SiLU()]
            before = channels
        self.trunk, self.head = nn.Sequential(*layers), nn.Linear(before * 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        features = nn.functional.adaptive_avg_pool2d(self.trunk(images), 2).flatten(1)
        return self.head(nn.functional.dropout(features, 0.3, self.training))


@dataclass(frozen=True)
class FrontFinder:
    """A trained classifier, and what it is worth.

    Attributes:
        network: in eval mode, on the CPU.
        threshold: of the probability of a front, above which a view counts as one.
        trust: what was seen on held-out models: `accuracy` of three classes, `fronts_found`, `false_fronts`, the
            same where the back is replaced by a second front, and on how many models.
    """

    network: ViewClassifier
    threshold: float
    trust: dict[str, Any]

    def score(self, layers: Layers) -> dict[str, float]:
        """Score the 24 views of one object, in colour.

        Returns:
            `many_faces`: the share of the views 75 degrees and more from the front that look like a front; `front`: the
            share of those within 30 degrees that do.
        """
        passed = front_probability(self.network, inputs(layers, "colour")) > self.threshold
        return {"many_faces": float(passed[ELSEWHERE].mean()), "front": float(passed[AT_FRONT].mean())}

    def ceiling(self) -> dict[str, dict[str, float]]:
        """The two scores of held-out real models."""
        return {"many_faces": {"mean": self.trust["false_fronts"]}, "front": {"mean": self.trust["fronts_found"]}}

    def save(self, path: Path = WEIGHTS) -> None:
        """Write it, weights in float16."""
        arrays = {name: value.half().numpy() for name, value in self.network.state_dict().items()}
        numbers = {f"trust.{name}": np.float64(value) for name, value in self.trust.items()}
        np.savez_compressed(path, threshold=np.float64(self.threshold), **numbers, **arrays)

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> FrontFinder:
        """Read what `save` wrote."""
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
        threshold = float(arrays.pop("threshold"))
        trust = {name[6:]: float(arrays.pop(name)) for name in list(arrays) if name.startswith("trust.")}
        network = ViewClassifier()
        network.load_state_dict({name: torch.from_numpy(value).float() for name, value in arrays.items()})
        return cls(network.eval(), threshold, trust)


def inputs(layers: Layers, mode: str) -> NDArray[np.float32]:
    """The classifier's inputs [n, 64, 64, 6]: the picture minus white, and normals in the camera's axes."""
    return np.concatenate([lit(layers, mode) - 1, turned_to_camera(layers) * layers.alpha[..., None]], -1)


@torch.inference_mode()
def _probabilities(network: ViewClassifier, images: NDArray[np.float32]) -> NDArray[np.float32]:
    batches = [network(torch.from_numpy(part).permute(0, 3, 1, 2)).softmax(-1) for part in _parts(images, 256)]
    return torch.cat(batches).numpy()


def _parts(images: NDArray[np.float32], count: int) -> list[NDArray[np.float32]]:
    return [np.ascontiguousarray(images[begin : begin + count]) for begin in range(0, len(images), count)]


def front_probability(network: ViewClassifier, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The probability [n] that views [n, 64, 64, 6] show a front."""
    return _probabilities(network, images)[:, FRONT]


def difference(layers: Layers) -> float:
    """How much the back differs from the mirrored front, in colour and normals, mean over the outline."""
    half = len(layers) // 2
    outline = np.maximum(layers.alpha[0], layers.alpha[half, :, ::-1])
    colour = np.abs(layers.albedo[0] - layers.albedo[half, :, ::-1]).mean(-1)
    # Of the same shape on both sides, normals mirror in x and in z.
    turned = layers.normal[half, :, ::-1] * np.array([1.0, 1.0, -1.0], np.float32)
    shape = np.abs(layers.normal[0] - turned).mean(-1) / 2
    return float(((colour + shape) * outline).sum() / max(float(outline.sum()), 1.0))


def has_front(layers: Layers) -> bool:
    """Whether a model's front can be told from its back at all."""
    return difference(layers) > _LEAST_DIFFERENCE


def split_of(key: str) -> str:
    """The part that a model belongs to by its key: `train` (two thirds), `threshold` or `test` (a sixth each)."""
    return {0: "threshold", 1: "test"}.get(zlib.crc32(key.encode()) % 6, "train")


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Views [n, 6, 64, 64] as objects of all kinds might look: mirrored, blurred, moved, in other colours."""
    count = len(images)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    mirrored = images.flip(-1) * torch.tensor([1, 1, 1, -1, 1, 1])[:, None, None]
    images = torch.where(uniform(1, 1, 1) < 0.5, images, mirrored)
    small = nn.functional.avg_pool2d(images, 2)
    blurred = nn.functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    images = torch.lerp(images, blurred, uniform(1, 1, 1))
    # Colours mix towards each other in one picture of three.
    mix = torch.softmax(4 * torch.eye(3) + 4 * uniform(3, 3) * (uniform(1, 1) < 0.33), dim=-1)
    images = torch.cat([torch.einsum("nij,njhw->nihw", mix, images[:, :3]), images[:, 3:]], 1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = (0.85 + 0.3 * uniform(1))[:, 0]
    theta[:, :, 2] = 0.1 * (uniform(2) - 0.5)
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def train(
    views: dict[str, Layers], epochs: int = 40, seed: int = 0, batch: int = 128, report: bool = True
) -> FrontFinder:
    """Train on models, and measure on those held out.

    Args:
        views: 24 views of 64 pixels of each model that has a front, by its key; `split_of` says what it is for.
        epochs: over the views of the training models, in colour or textureless by lot.
        seed: of everything random.
        batch: pictures in a step.
        report: print a line per epoch.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    keys = {part: sorted(k for k in views if split_of(k) == part) for part in ("train", "threshold", "test")}
    known = np.flatnonzero(LABEL >= 0)
    shown = [np.concatenate([_bytes(inputs(views[k], mode)[known]) for k in keys["train"]]) for mode in pictures.MODES]
    data = torch.from_numpy(np.stack(shown)).permute(0, 1, 4, 2, 3)
    labels = torch.from_numpy(LABEL[known]).repeat(len(keys["train"]))
    network = ViewClassifier().train()
    weight = 1 / torch.bincount(labels, minlength=3).float()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    steps = epochs * -(-len(labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.15)
    for epoch in range(epochs):
        losses = []
        for chosen in torch.randperm(len(labels), generator=generator).split(batch):
            mode = torch.randint(2, (len(chosen),), generator=generator)
            images = _augmented(data[mode, chosen].float() / 127, generator)
            loss = nn.functional.cross_entropy(
                network(images), labels[chosen], weight / weight.sum(), label_smoothing=0.05
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        if report:
            print(f"epoch {epoch + 1}/{epochs}: loss {float(torch.stack(losses).mean()):.3f}", flush=True)
    # What is measured is what is stored.
    network = network.eval().half().float()
    threshold = _threshold(network, [views[key] for key in keys["threshold"]])
    trust = _trust(network, threshold, [views[key] for key in keys["test"]])
    return FrontFinder(network, threshold, {"models_trained": len(keys["train"]), **trust})


def _bytes(values: NDArray[np.float32]) -> NDArray[np.int8]:
    return np.round(values * 127).astype(np.int8)


def _threshold(network: ViewClassifier, models: Sequence[Layers]) -> float:
    elsewhere = [front_probability(network, inputs(layers, "colour"))[ELSEWHERE] for layers in models]
    return float(np.quantile(np.concatenate(elsewhere), 1 - FALSE_FRONTS)) if elsewhere else 0.5


def _trust(network: ViewClassifier, threshold: float, models: Sequence[Layers]) -> dict[str, float]:
    each = np.stack([_probabilities(network, inputs(layers, "colour")) for layers in models])
    known, passed = LABEL >= 0, each[..., FRONT] > threshold
    twofold = passed.copy()
    twofold[:, LABEL == BACK] = passed[:, AT_FRONT]
    right = each.argmax(-1)[:, known] == LABEL[known]
    return {
        "models_tested": len(models),
        "accuracy": float(np.mean([right[:, LABEL[known] == kind].mean() for kind in (FRONT, SIDE, BACK)])),
        "fronts_found": float(passed[:, AT_FRONT].mean()),
        "false_fronts": float(passed[:, ELSEWHERE].mean()),
        "false_fronts_of_two_faced": float(twofold[:, ELSEWHERE].mean()),
    }
