"""A batch of views through the guidance in parts, for the memory of one part at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfusion_fast.guidance.contract import T_RANGE, Guidance, PromptEmbeddings, SDSOutput, Views
from dreamfusion_fast.guidance.memory import BatchPart


def sds_gradient_in_parts(
    guidance: Guidance,
    images: Tensor,
    embeddings: PromptEmbeddings,
    views: Views,
    views_per_call: int,
    t_range: tuple[float, float] = T_RANGE,
    generator: torch.Generator | None = None,
    sds_share: float | None = None,
) -> SDSOutput:
    """`Guidance.sds_gradient` of a batch, in calls of at most `views_per_call` views.

    With a generator, a seed means the same timesteps and noise as in one call (see `BatchPart`), and the generator is
    left as one call leaves it: results are those of one call, up to the rounding of products of another shape. Without
    one, each part draws its own.

    Args:
        guidance: what pulls.
        images: [B, 3, H, W] in [0, 1], on the guidance's device.
        embeddings: from `guidance.embed`.
        views: of the B images.
        views_per_call: most views at a time, at least 1.
        t_range, sds_share: as in `Guidance.sds_gradient`.
        generator: source of timesteps and noise.

    Raises:
        ValueError: views_per_call is below 1.
        NonFiniteError: images or gradient hold a NaN or an infinity.
    """
    if views_per_call < 1:
        raise ValueError(f"views_per_call: got {views_per_call}, want at least 1")
    batch = len(images)
    if batch <= views_per_call:
        return guidance.sds_gradient(
            images, embeddings, views, t_range=t_range, generator=generator, sds_share=sds_share
        )
    state = None if generator is None else generator.get_state()
    outputs: list[SDSOutput] = []
    for first in range(0, batch, views_per_call):
        rows = slice(first, first + views_per_call)
        if generator is not None and state is not None:
            generator.set_state(state)
        outputs.append(
            guidance.sds_gradient(
                images[rows],
                embeddings,
                views[rows],
                t_range=t_range,
                generator=generator,
                sds_share=sds_share,
                part=None if generator is None else BatchPart(first, batch),
            )
        )
    return SDSOutput(*(torch.cat(values) for values in zip(*outputs, strict=True)))
