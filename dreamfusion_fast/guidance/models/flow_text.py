"""Prompts as vectors for flow-matching models, which read CLIP and T5 side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.models.pipeline_source import PipelineSource
from dreamfusion_fast.guidance.models.text_encoders import PromptEncoder
from dreamfusion_fast.guidance.prompts import Prompt


class StableDiffusion3Prompts(PromptEncoder):
    """The text encoders of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206, appendix B.1).

    The penultimate hidden states of two CLIPs side by side, filled up with zeros to T5's width, and T5's last hidden
    states behind them; the pooled outputs of both CLIPs side by side. Where a pipeline is without its T5, zeros stand
    in for that, as the model was trained for.

    Args:
        source, config, dtype, device: as in `PromptEncoder`.
        suffixes: ("", "_2", "_3"), or ("", "_2") without T5.
        width: of what the transformer attends to.
    """

    t5_tokens = 256

    def __init__(
        self,
        source: PipelineSource,
        suffixes: Sequence[str],
        config: GuidanceConfig,
        dtype: torch.dtype,
        device: torch.device,
        width: int,
    ):
        super().__init__(source, suffixes, config, dtype, device)
        self._width = width
        clips = self._sum_of("hidden_size")
        if clips is not None and clips > width:
            raise source.error(
                f"its two CLIPs give vectors of width {clips} together, more than the {width} the transformer reads"
            )

    def _sum_of(self, field: str) -> int | None:
        """The sum of a size of both CLIPs; None if a configuration lacks it."""
        sizes: list[Any] = [self._configs[suffix].get(field) for suffix in ("", "_2")]
        return sum(sizes) if all(isinstance(size, int) for size in sizes) else None

    def _classes(self, suffix: str) -> Sequence[str]:
        return ("T5EncoderModel",) if suffix == "_3" else ("CLIPTextModelWithProjection",)

    @property
    def hidden_width(self) -> int | None:
        """Width of the vectors that the transformer attends to: T5's, or what stands in for them."""
        return self._configs["_3"].get("d_model") if "_3" in self._suffixes else self._width

    @property
    def pooled_width(self) -> int | None:
        """Width of both pooled outputs together."""
        return self._sum_of("projection_dim")

    @property
    def _form(self) -> str:
        return "sd3-1" if "_3" in self._suffixes else f"sd3-without-t5-{self._width}-1"

    def _taken(self, suffix: str, output: Any) -> tuple[Tensor, Tensor]:
        return (output[0], output[0]) if suffix == "_3" else (output.hidden_states[-2], output[0])

    def _joined(self, texts: list[Prompt], outputs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        (first, first_pooled), (second, second_pooled), *rest = outputs
        clips = torch.cat((first, second), dim=-1)
        t5 = rest[0][0] if rest else clips.new_zeros(len(texts), self.t5_tokens, self._width)
        clips = F.pad(clips, (0, self._width - clips.shape[-1]))
        return {
            "hidden": torch.cat((clips, t5), dim=1),
            "pooled": torch.cat((first_pooled, second_pooled), dim=-1),
        }

    def _read(self, suffix: str, text: str) -> str:
        return text


class FluxPrompts(PromptEncoder):
    """The text encoders of FLUX.1: T5's last hidden states, and CLIP's pooled output.

    Args:
        source, config, dtype, device: as in `PromptEncoder`.
        tokens: that T5 reads at most.
    """

    def __init__(
        self, source: PipelineSource, config: GuidanceConfig, dtype: torch.dtype, device: torch.device, tokens: int
    ):
        self.t5_tokens = tokens
        super().__init__(source, ("", "_2"), config, dtype, device)

    def _classes(self, suffix: str) -> Sequence[str]:
        return ("T5EncoderModel",) if suffix == "_2" else ("CLIPTextModel",)

    @property
    def hidden_width(self) -> int | None:
        """Width of T5's vectors."""
        return self._configs["_2"].get("d_model")

    @property
    def pooled_width(self) -> int | None:
        """Width of CLIP's pooled output."""
        return self._configs[""].get("hidden_size")

    @property
    def _form(self) -> str:
        return f"flux-{self.t5_tokens}-1"

    def _taken(self, suffix: str, output: Any) -> tuple[Tensor, Tensor]:
        return (output[0], output[0]) if suffix == "_2" else (output[0], output.pooler_output)

    def _joined(self, texts: list[Prompt], outputs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {"hidden": outputs[1][0], "pooled": outputs[0][1]}

    def _read(self, suffix: str, text: str) -> str:
        return text
