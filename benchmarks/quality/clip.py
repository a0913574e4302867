"""CLIP as the judge of any list of prompts, for those with a network (`pip install open_clip_torch`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quality import intervals


class ClipJudge:
    """CLIP by open_clip.

    Args:
        network: with `encode_image`, `encode_text`; in eval mode.
        tokenizer: of a list of texts.
        size: height and width of its pictures.
        mean, deviation: of the channels of its pictures.
        device: where it works.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        size: int,
        mean: Sequence[float],
        deviation: Sequence[float],
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.network, self.tokenizer, self.size = network.to(self.device), tokenizer, size
        self.mean, self.deviation = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (mean, deviation))

    @classmethod
    def load(cls, model: str, weights: str, device: torch.device | str = "cpu") -> ClipJudge:
        """By open_clip's names, or with a file of weights; what is not there is downloaded."""
        import open_clip

        network, _, _ = open_clip.create_model_and_transforms(model, pretrained=weights)
        visual = network.visual
        size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
        mean, deviation = visual.image_mean or _MEAN, visual.image_std or _DEVIATION
        return cls(network.eval(), open_clip.get_tokenizer(model), size, mean, deviation, device)

    @torch.inference_mode()
    def images(self, pictures: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit vectors [n, c] of pictures [n, size, size, 3] in [0, 1]."""
        pixels = torch.as_tensor(pictures).to(self.device).permute(0, 3, 1, 2)
        pixels = torch.nn.functional.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True)
        features = self.network.encode_image((pixels.clamp(0, 1) - self.mean) / self.deviation)
        return torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [n, c] of prompts."""
        features = self.network.encode_text(self.tokenizer(list(prompts)).to(self.device))
        return torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()


_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's models


def clip_scores(
    judge: ClipJudge, objects: Mapping[str, NDArray[np.float32]], controls: Mapping[str, NDArray[np.float32]]
) -> dict[str, Any]:
    """Similarity of objects to their prompts.

    Args:
        judge: who is asked.
        objects: views [n, size, size, 3] by prompt.
        controls: views that show nothing, by name.

    Returns:
        `similarity`: cosine of picture and prompt, mean over the views; `permuted`: the same with the prompts of
        others; `first`: how often no other prompt is nearer (R-precision); each with an interval over the prompts.
        `controls`: the mean cosine of each control with all prompts. `prompts`: a row for each.
    """
    prompts = list(objects)
    texts = judge.texts(prompts)
    near = np.stack([(judge.images(objects[prompt]) @ texts.T).mean(0) for prompt in prompts])
    own = near.diagonal()
    wrong = (near.sum(1) - own) / max(1, len(prompts) - 1)
    first = (near.argmax(1) == np.arange(len(prompts))).astype(float)
    return {
        "similarity": intervals.mean(own.tolist()),
        "permuted": intervals.mean(wrong.tolist()),
        "first": intervals.share(first.tolist()),
        "controls": {name: float((judge.images(images) @ texts.T).mean()) for name, images in controls.items()},
        "prompts": [
            {"prompt": prompt, "similarity": float(a), "permuted": float(b), "first": float(c)}
            for prompt, a, b, c in zip(prompts, own, wrong, first, strict=True)
        ],
    }
