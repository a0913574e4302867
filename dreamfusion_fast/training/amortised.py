"""The amortised initialisation: one pass of a network, trained on many objects, makes a field to start from.

The network (`PlaneTransformer`) reads the prompt and a code that tells objects with one caption apart. A
`TriplaneField` reads its planes; a run's own field is fitted to that (`training.fitting`). A file holds both, the
codes, and vectors of the captions that it was trained on: a prompt that is near none of them is not known.
`tools/train_amortised.py` makes such files.

Source: Lorraine et al. 2023, ATT3D: Amortized Text-to-3D Object Synthesis (arXiv 2306.07349); the planes as in Hong et
al. 2023, LRM (arXiv 2311.04400). Here the network is trained on pictures, and distillation comes after.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dreamfusion_fast.errors import UserError, joined
from dreamfusion_fast.fields.triplane_field import TriplaneField, TriplaneFieldConfig
from dreamfusion_fast.guidance.models.embedded.quantize import load_metadata, load_weights, save_weights
from dreamfusion_fast.guidance.models.embedded.text_encoder import WIDTH, TextEncoder
from dreamfusion_fast.io import user_path
from dreamfusion_fast.networks.plane_transformer import PlaneTransformer, PlaneTransformerConfig
from dreamfusion_fast.training.config_io import from_dict, to_dict

SCRATCH = "scratch"
"""`Config.init` of a run that starts from random parameters."""
AMORTISED = "amortised"
"""`Config.init` of a run that starts from what the package's network makes of the prompt."""
WEIGHTS = Path(__file__).parent / "weights" / "amortised.safetensors.gz"
FORMAT = "dreamfusion_fast amortised 1"
# Objects whose captions are this much farther from a prompt than the nearest one may be meant, too: a cosine.
_AS_NEAR = 0.02
_VECTORS = "captions"
# What the largest weight of a row is rounded to: 6 bits, so that the repository stays small.
_LARGEST = 31
_BAD_FILE = (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, UserError)


class AmortisedField(nn.Module):
    """The network, the field that reads its planes, and a code per object.

    Args:
        network: settings of the network.
        field: settings of the field; resolution and features are the network's.
        objects: how many have a code.
        generator: a CPU generator that makes the initial parameters reproducible.

    Attributes:
        network: captions and codes to planes.
        field: of it the MLP is read, and no planes of its own.
        codes: `[objects, code_width]`, initially N(0, 1).

    Raises:
        ValueError: a field that does not fit the network.
    """

    def __init__(
        self,
        network: PlaneTransformerConfig,
        field: TriplaneFieldConfig,
        objects: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        wanted = (network.resolution, network.features, 1)
        if (field.resolution, field.features, field.scenes) != wanted:
            raise ValueError(
                f"field: got resolution {field.resolution}, features {field.features}, scenes {field.scenes}, want "
                f"{', '.join(map(str, wanted))}, as the network makes planes"
            )
        self.network = PlaneTransformer(network, generator)
        self.field = TriplaneField(field, generator=generator)
        self.field.planes.requires_grad_(False)
        self.codes = nn.Parameter(torch.randn(objects, network.code_width, generator=generator))

    def planes(self, states: Tensor, pooled: Tensor, code: Tensor | None = None) -> Tensor:
        """Planes `[n, 3, resolution, resolution, features]`, float32.

        Args:
            states: `[n, L, width]` of a `TextEncoder`: zero where there is no token.
            pooled: `[n, width]`.
            code: `[n, code_width]`; rows of NaN, or None for all: no code.
        """
        return self.network(states, pooled, (states != 0).any(dim=2), code)

    def trained_state(self) -> dict[str, Tensor]:
        """The trained tensors by name: all but the planes that the field would have of its own, and its box."""
        own = {f"field.{name}" for name in ("planes", "aabb")}
        return {name: value for name, value in self.state_dict().items() if name not in own}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `trained_state`.

        Raises:
            RuntimeError: something lacks, is too much, or has another shape.
        """
        whole = self.state_dict()
        kept = {name: whole[name] for name in whole.keys() - self.trained_state().keys()}
        self.load_state_dict({**kept, **state})


@dataclass(frozen=True)
class Nearest:
    """What is nearest to a prompt.

    Attributes:
        phrase: the noun phrase of a known caption, such as "grand piano".
        similarity: cosine of its vector and the prompt's, -1 to 1.
        known: whether that is near enough to start from.
        objects: those that may be meant, as rows of the codes.
    """

    phrase: str
    similarity: float
    known: bool
    objects: tuple[int, ...]

    def object(self, seed: int) -> int:
        """One of the objects, drawn by a seed."""
        generator = torch.Generator().manual_seed(seed)
        return self.objects[int(torch.randint(len(self.objects), (), generator=generator))]


@dataclass(frozen=True, eq=False)
class KnownCaptions:
    """The captions that a network was trained on, without colours.

    Attributes:
        objects: of each noun phrase, rows of the codes.
        vectors: `[n, WIDTH]`, the pooled vector of each phrase with its article, in their order.
        colours: words that captions may have before the noun phrase; a prompt is compared without them.
        threshold: least similarity of a known prompt.
    """

    objects: Mapping[str, Sequence[int]]
    vectors: Tensor
    colours: tuple[str, ...]
    threshold: float

    def nearest(self, prompt: str, encoder: nn.Module) -> Nearest:
        """The nearest of them, and the objects that are about as near.

        Args:
            prompt: any text.
            encoder: as `TextEncoder`.
        """
        words = "|".join(map(re.escape, self.colours))
        without = " ".join(re.sub(rf"\b(?:{words})\b", " ", prompt.lower()).split()) if words else prompt
        pooled = encoder([without])[1].cpu()
        cosines = nn.functional.normalize(self.vectors, dim=1) @ nn.functional.normalize(pooled[0], dim=0)
        best = int(cosines.argmax())
        phrases, similarity = list(self.objects), float(cosines[best])
        near = [phrases[i] for i in (cosines >= similarity - _AS_NEAR).nonzero().flatten().tolist()]
        meant = sorted({number for phrase in near for number in self.objects[phrase]})
        return Nearest(phrases[best], similarity, similarity >= self.threshold, tuple(meant))


def save_amortised(path: Path, model: AmortisedField, captions: KnownCaptions, card: Mapping[str, str]) -> None:
    """Write a file for `Config.init`: rounded weights (`save_weights`), settings, captions and a card.

    Args:
        path: ends in .safetensors.gz, by custom.
        model: trained.
        captions: that it was trained on.
        card: data, licences and the like, for people.
    """
    metadata = {
        "format": FORMAT,
        "config": json.dumps(to_dict(model.network.config)),
        "field": json.dumps(to_dict(model.field.config)),
        "objects": json.dumps({phrase: list(rows) for phrase, rows in captions.objects.items()}),
        "colours": json.dumps(list(captions.colours)),
        "threshold": str(captions.threshold),
    }
    save_weights(path, {**model.trained_state(), _VECTORS: captions.vectors}, {**card, **metadata}, _LARGEST)


def load_amortised(path: str | Path) -> tuple[AmortisedField, KnownCaptions]:
    """Undo `save_amortised`; float32, on the CPU, in evaluation mode, parameters frozen. "amortised": the package's.

    Raises:
        UserError: there is no such file, it is damaged, or it is another one.
    """
    try:
        metadata = _metadata(path)
        state, _ = load_weights(_path(path))
        objects: dict[str, list[int]] = json.loads(metadata["objects"])
        vectors, codes = state.pop(_VECTORS), state["codes"]
        numbers = [row for rows in objects.values() for row in rows]
        if list(vectors.shape) != [len(objects), WIDTH] or not all(0 <= row < len(codes) for row in numbers):
            raise ValueError(f"{len(objects)} captions of {len(codes)} codes, vectors {list(vectors.shape)}")
        if not objects or not all(objects.values()):
            raise ValueError("a caption of no object")
        network = from_dict(PlaneTransformerConfig, json.loads(metadata["config"]), source="config")
        model = AmortisedField(network, _field_of(metadata), len(codes))
        model.load_trained_state(state)
        colours = tuple(str(word) for word in json.loads(metadata["colours"]))
        captions = KnownCaptions(objects, vectors, colours, float(metadata["threshold"]))
    except _BAD_FILE as error:
        raise _unreadable(path, error) from error
    return model.eval().requires_grad_(False), captions


def check_init(init: str) -> None:
    """Raise UserError where `Config.init` names a file that is none of `save_amortised`, as far as its header says."""
    if init == SCRATCH:
        return
    try:
        _field_of(_metadata(init))
    except _BAD_FILE as error:
        raise _unreadable(init, error) from error


@torch.no_grad()
def field_of_prompt(init: str | Path, prompt: str, seed: int) -> tuple[Nearest, TriplaneField | None]:
    """What a network makes of a prompt: the nearest caption, and a field, or None where the prompt is not known.

    Args:
        init: "amortised", or the path of a file.
        prompt: what to make.
        seed: draws one of the objects that may be meant, whose code is taken.

    Returns:
        Both; the field is on the CPU, with planes `[1, 3, resolution, resolution, features]`, its parameters frozen.

    Raises:
        UserError: as `load_amortised`.
    """
    model, captions = load_amortised(init)
    encoder = TextEncoder()
    nearest = captions.nearest(prompt, encoder)
    if not nearest.known:
        return nearest, None
    states, pooled = encoder([prompt])
    model.field.planes.copy_(model.planes(states, pooled, model.codes[nearest.object(seed)][None]))
    return nearest, model.field


def _path(init: str | Path) -> Path:
    return WEIGHTS if init == AMORTISED else user_path(init, "--init")


def _metadata(path: str | Path) -> dict[str, str]:
    metadata = load_metadata(_path(path))
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format', 'another one')}, want {FORMAT}")
    return metadata


def _field_of(metadata: Mapping[str, str]) -> TriplaneFieldConfig:
    return from_dict(TriplaneFieldConfig, json.loads(metadata["field"]), source="field")


def _unreadable(path: str | Path, error: Exception) -> UserError:
    why = error.strerror or error if isinstance(error, OSError) else joined(error)
    return UserError(
        f"--init {path}: cannot be read ({why}); want {AMORTISED}, {SCRATCH}, or a file of train_amortised.py pack"
    )
