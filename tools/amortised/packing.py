"""From a training to the file that a run starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from prior_data.captions import compose, noun_phrases
from prior_data.colours import COLOURS
from torch import nn

from dreamfusion_fast.training.amortised import KnownCaptions, save_amortised

from .training import averaged_of

# Cosine of a prompt's vector and the nearest caption's, between those of prompts about things of the catalogue in other
# words and those of prompts about other things or nothing.
THRESHOLD = 0.72


def known_captions(models: list[dict[str, Any]], encoder: nn.Module, threshold: float = THRESHOLD) -> KnownCaptions:
    """The captions of the models that were trained on, and which of them each is of.

    Args:
        models: of models.json; those trained on have codes, in this order.
        encoder: of the captions.
        threshold: least similarity of a known prompt.
    """
    trained = [model for model in models if model["split"] == "train" and model["weight"] > 0]
    phrases = noun_phrases(trained)
    objects = {phrase: [i for i, model in enumerate(trained) if phrase in model["phrases"]] for phrase in phrases}
    captions = [compose(phrase) for phrase in phrases]
    pooled = [encoder(captions[i : i + 256])[1] for i in range(0, len(captions), 256)]
    vectors = nn.functional.normalize(torch.cat(pooled), dim=1)
    return KnownCaptions(objects, vectors, COLOURS, threshold)


def pack(state: Path, data: Path, encoder: nn.Module, path: Path, threshold: float = THRESHOLD) -> int:
    """Write the averaged weights of a training for `Config.init`; the size of the file in bytes.

    Args:
        state: folder of the training.
        data: that it was trained on.
        encoder: of the captions.
        path: to write to.
        threshold: least similarity of a known prompt.

    Raises:
        ValueError: there is no state, or it is of another catalogue.
    """
    model, record = averaged_of(state)
    models = json.loads((data / "models.json").read_text(encoding="utf-8"))
    captions = known_captions(models, encoder, threshold)
    trained = 1 + max(row for rows in captions.objects.values() for row in rows)
    if trained != len(model.codes):
        raise ValueError(f"data: has {trained} models to train on, the state in {state} {len(model.codes)}")
    licences = sorted({str(model["licence"]) for model in models if "licence" in model})
    card = {
        "data": f"{trained} models of Sweet Home 3D's furniture libraries 1.8, rendered at 64 x 64; creators: NOTICE",
        "licences": ", ".join(licences),
        "steps": str(record["steps"]),
        "seconds": f"{record['seconds']:.0f}",
    }
    save_amortised(path, model, captions, card)
    return path.stat().st_size
