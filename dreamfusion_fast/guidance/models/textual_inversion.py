"""Textual inversions (Gal et al. 2022) from files: words whose embeddings were learned, for CLIP text encoders.

A file holds one or more vectors for a word, by the name of an encoder where there are two. The word may stand anywhere
in a prompt or negative prompt. What the tokenizer sees in its place are new tokens, one for each vector, so a word that
was in the vocabulary before keeps its own meaning in other prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.errors import one_line
from dreamfusion_fast.guidance.config import split_file
from dreamfusion_fast.guidance.models.pipeline_files import read_tensors

# What the trainers of the sites call one encoder's vectors, where the name is not the word's.
_OF_ONE = "emb_params"
_OF_TWO = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
# CLIP reads 77 tokens, two of which are not words.
_MOST_VECTORS = 75


@dataclass(frozen=True)
class TextualInversion:
    """One file, checked against a pipeline.

    Attributes:
        path: of the file.
        digest: sha256 of its contents.
        word: in prompts.
        keys: names of tensors, by text encoder.
        count: vectors for the word.
    """

    path: Path
    digest: str
    word: str
    keys: Mapping[str, str]
    count: int

    def tokens(self, number: int) -> list[str]:
        """The new tokens, if it is the `number`-th inversion."""
        return [f"<|inversion-{number}-{index}|>" for index in range(self.count)]

    def vectors(self, component: str) -> Tensor:
        """``[count, width]``; raises ValueError if the file is no longer the one that was checked."""
        tensors, _, digest = read_tensors(self.path)
        if digest != self.digest:
            raise ValueError(f"{self.path} has changed since it was checked")
        return torch.atleast_2d(tensors[self.keys[component]])


def open_inversion(text: str, widths: Mapping[str, int]) -> TextualInversion:
    """Read and check a textual inversion.

    Args:
        text: path of a safetensors file, and the word in prompts if it is not the one in the file, or where there is
            none the file's name: "file.safetensors:<my-cat>".
        widths: of token embeddings, by text encoder.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no textual inversion for this pipeline.
    """
    name, word = split_file(text)
    path = Path(name)
    tensors, _, digest = read_tensors(path)
    if set(tensors) == {_OF_ONE}:
        keys = {"text_encoder": _OF_ONE}
    elif set(tensors) == set(_OF_TWO):
        keys = {component: key for key, component in _OF_TWO.items()}
    elif len(tensors) == 1:
        (key,) = tensors
        keys, word = {"text_encoder": key}, key if word is None else word
    else:
        held = ", ".join(one_line(key, 60) for key in list(tensors)[:3])
        raise ValueError(f"it is no textual inversion, it holds {len(tensors)} tensors ({held})")
    if set(keys) != set(widths):
        held = " and ".join(widths) or "no CLIP text encoder"
        raise ValueError(f"it has vectors for {' and '.join(keys)}, this pipeline has {held}")
    counts = set()
    for component, key in keys.items():
        value = torch.atleast_2d(tensors[key])
        if value.ndim != 2 or value.shape[1] != widths[component] or not 1 <= len(value) <= _MOST_VECTORS:
            raise ValueError(
                f"its {one_line(key, 60)} is {list(tensors[key].shape)}, want 1 to {_MOST_VECTORS} vectors of width "
                f"{widths[component]}, that of {component}: it was made for another model"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"its {one_line(key, 60)} holds NaN or infinity")
        counts.add(len(value))
    if len(counts) != 1:
        raise ValueError("it has more vectors for one text encoder than for the other")
    word = path.stem if word is None else word
    if not word.strip() or not word.isprintable() or word != word.strip() or len(word) > 100:
        raise ValueError(f"{one_line(repr(word), 60)} is no word for it: name one, as in file.safetensors:<my-cat>")
    return TextualInversion(path, digest, word, keys, counts.pop())


class Words:
    """The words of several inversions, and what they do to prompts, tokenizers and text encoders."""

    def __init__(self, inversions: Sequence[TextualInversion] = ()):
        self.inversions = tuple(inversions)
        self._first: dict[str, int] = {}
        self._tokens = {
            inversion.word.lower(): "".join(inversion.tokens(number)) for number, inversion in enumerate(inversions)
        }
        if len(self._tokens) < len(self.inversions):
            raise ValueError("two of them are for the same word: name others, as in file.safetensors:<my-cat>")
        # Longest first, so that "<cat> two" is not read as "<cat>"; a word inside of another one is left alone.
        words = sorted(map(re.escape, self._tokens), key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE) if words else None

    def replaced(self, text: str) -> str:
        """A text with the new tokens in place of the words, as CLIP reads them: in any case."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: f" {self._tokens.get(match[0].lower(), match[0])} ", text)

    def teach_tokenizer(self, suffix: str, tokenizer: Any) -> None:
        """Add the new tokens to "tokenizer" + suffix."""
        from tokenizers import AddedToken

        self._first[suffix] = len(tokenizer)
        tokens = [token for number, inversion in enumerate(self.inversions) for token in inversion.tokens(number)]
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
        wanted = list(range(self._first[suffix], self._first[suffix] + len(tokens)))
        if tokenizer.convert_tokens_to_ids(tokens) != wanted:
            raise ValueError("the tokenizer cannot be given new tokens")

    def teach_encoder(self, suffix: str, model: Any) -> None:
        """Put their vectors into the embedding of "text_encoder" + suffix, where its tokenizer has them."""
        component, embedding = f"text_encoder{suffix}", model.get_input_embeddings()
        known, first = embedding.weight.detach(), self._first[suffix]
        if first > len(known):
            raise ValueError(f"{component} has {len(known)} tokens, its tokenizer {first}: they do not go together")
        vectors = [inversion.vectors(component).to(known.device, known.dtype) for inversion in self.inversions]
        weight = torch.cat([known[:first], *vectors])
        embedding.weight = torch.nn.Parameter(weight, requires_grad=False)
        embedding.num_embeddings = len(weight)
        for module in model.modules():
            # Of most published configurations: the end of a text is then found as the largest token, which it was.
            if getattr(module, "eos_token_id", None) == 2:
                module.eos_token_id = first - 1
