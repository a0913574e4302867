"""Prompts as vectors: text encoders are loaded one at a time, where they fit, and freed before anything else is loaded.

No text encoder needs a card that holds it. T5-XXL (4.8 billion weights, 9.5 GB in bfloat16), which DeepFloyd IF reads,
is run from main memory, one layer after another on the GPU, where the card is smaller.
"""

from __future__ import annotations

import functools
import gc
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dreamfusion_fast.errors import NonFiniteError, UserError
from dreamfusion_fast.gpu.memory import free_bytes
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.models.pipeline_classes import TEXT_ENCODERS
from dreamfusion_fast.guidance.models.pipeline_source import PipelineSource
from dreamfusion_fast.guidance.prompts import Prompt, shortened, warn_of_lost_words
from dreamfusion_fast.networks.offload import installed

Placement = Literal["gpu", "layers", "cpu"]
"""Where an encoder runs: whole on the GPU, layer by layer on the GPU from main memory, or on the CPU."""

# A start, an end and a word.
_FEWEST_TOKENS = 3
# Weights may take this part of the memory that is free; the rest is for activations and what the allocator loses.
_FREE_SHARE = 0.6


class PromptEncoder:
    """The text encoders of one diffusers pipeline: one (Stable Diffusion, DeepFloyd IF) or two (SDXL).

    Those of flow-matching models derive from it (`flow_text`).

    With one encoder the embedding of a text is its last hidden state. With two it is, as in Podell et al. 2023 (SDXL,
    section 2.1), the penultimate hidden states of both side by side, and the pooled output of the last.

    Args:
        source: the pipeline.
        suffixes: endings of the component names, in the pipeline's order: ("",) or ("", "_2").
        config: its text_device and text_dtype are followed.
        dtype: arithmetic of the diffusion model, which text_dtype "auto" follows.
        device: of the run.

    Raises:
        UserError: an encoder of a class that is not known here; a choice of text_device or text_dtype that this machine
            or this encoder cannot follow.
    """

    # DeepFloyd IF was trained on captions of at most 77 tokens, although T5 takes longer ones.
    t5_tokens = 77

    def __init__(
        self,
        source: PipelineSource,
        suffixes: Sequence[str],
        config: GuidanceConfig,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._source = source
        self._suffixes = tuple(suffixes)
        self._wanted_dtype = config.text_dtype
        self._wanted_device = config.text_device
        self._model_dtype = dtype
        self._device = device
        self._configs = {suffix: source.config(f"text_encoder{suffix}") for suffix in self._suffixes}
        self._two = len(self._suffixes) > 1
        # SDXL's base model was trained with zeros in place of the embedding of no text, and its index says so.
        self._zeros_for_empty = self._two and bool(source.index.get("force_zeros_for_empty_prompt", False))
        self._check()

    def _check(self) -> None:
        for suffix in self._suffixes:
            class_name, wanted = self._source.class_name(f"text_encoder{suffix}"), self._classes(suffix)
            if class_name not in wanted:
                raise self._source.error(
                    f"text_encoder{suffix} is of class {class_name}, wanted is {' or '.join(wanted)}"
                )
        on_gpu = self._device.type == "cuda"
        if self._wanted_device == "cuda" and not on_gpu:
            raise UserError(f"guidance text_device cuda: this run is on {self._device}, use text_device auto or cpu")
        if self._wanted_dtype == "float16" and any(map(self._is_t5, self._suffixes)):
            raise UserError(
                f"guidance text_dtype float16: the text encoder of {self._source.name!r} is a T5, whose activations "
                "overflow in float16: use auto, bfloat16, float32 or int8"
            )
        if self._wanted_dtype == "int8":
            if not on_gpu:
                raise UserError(
                    f"guidance text_dtype int8 needs a GPU, and this run is on {self._device}: use bfloat16"
                )
            absent = [library for library in ("bitsandbytes", "accelerate") if not installed(library)]
            if absent:
                raise UserError(
                    f"guidance text_dtype int8 needs {' and '.join(absent)}, not installed here: pip install "
                    f"{' '.join(absent)}, or use text_dtype bfloat16"
                )

    def _classes(self, suffix: str) -> Sequence[str]:
        """Names of the classes that an encoder may be of."""
        # Of two encoders the last gives a pooled output as well.
        if self._two and suffix == self._suffixes[-1]:
            return ("CLIPTextModelWithProjection",)
        # Pipelines with a BERT (tools/latent_prior) have one encoder.
        return [name for name in TEXT_ENCODERS if not (self._two and name == "BertModel")]

    @property
    def hidden_width(self) -> int | None:
        """Width of the vectors the U-Net attends to, of all encoders together; None if a configuration lacks it."""
        widths: list[Any] = [config.get("hidden_size", config.get("d_model")) for config in self._configs.values()]
        return sum(widths) if all(isinstance(width, int) for width in widths) else None

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled output of two encoders; None for one encoder."""
        return self._configs[self._suffixes[-1]].get("projection_dim") if self._two else None

    @property
    def identity(self) -> str:
        """A string that changes whenever the embedding of some text could change by more than where it is computed."""
        dtypes = ",".join(f"{name} in {dtype}" for name, dtype in map(self._dtype, self._suffixes))
        components = [f"{part}{suffix}" for suffix in self._suffixes for part in ("tokenizer", "text_encoder")]
        return f"{self._form}:{dtypes}:{self._source.variant}:{self._source.identity(components)}"

    @property
    def _form(self) -> str:
        """What is made of the encoders' outputs, for the identity."""
        # The number is raised whenever texts become other tokens; before 2, long prompts lost the name of the view.
        return f"{'pooled' if self._two else 'last'}{'-zeros' if self._zeros_for_empty else ''}-2"

    def embed(self, texts: list[Prompt]) -> dict[str, Tensor]:
        """Embed n texts in one batch per encoder.

        Texts that are too long for an encoder lose words, as `prompts.shortened` says, and a warning names them.

        Returns:
            On the CPU, in the encoder's dtype: "hidden" [n, tokens, width] and with two encoders "pooled" [n, width].

        Raises:
            UserError: an encoder cannot be loaded, or the GPU is too small for one that text_device or int8 put there.
            NonFiniteError: an encoder overflows in this dtype.
        """
        with self._source.faults("its text encoder cannot embed the prompt"):
            tokens = self._tokenize(texts)
            outputs = [self._embed_with(suffix, tokens[suffix]) for suffix in self._suffixes]
        return self._joined(texts, outputs)

    def _joined(self, texts: list[Prompt], outputs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The embedding of n texts, of what `_taken` took of each encoder's output."""
        if not self._two:
            return {"hidden": outputs[0][0]}
        tensors = {"hidden": torch.cat([hidden for hidden, _ in outputs], dim=-1), "pooled": outputs[-1][1]}
        if self._zeros_for_empty:
            empty = torch.tensor([not str(text) for text in texts])
            for value in tensors.values():
                value[empty] = 0
        return tensors

    def _embed_with(self, suffix: str, tokens: Any) -> tuple[Tensor, Tensor]:
        """What `_taken` takes of an encoder's output, on the CPU; the encoder is gone after it."""
        placements = self._placements(suffix)
        for placement in placements:
            try:
                hidden, other = self._evaluate(suffix, placement, tokens)
                break
            except torch.OutOfMemoryError:
                if placement == placements[-1]:
                    raise self._source.error(
                        f"text_encoder{suffix} does not fit into the memory of "
                        f"{self._device}: use guidance text_device auto and text_dtype auto"
                    ) from None
            finally:
                gc.collect()
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
        if not (hidden.isfinite().all() and other.isfinite().all()):
            raise NonFiniteError(
                f"guidance {self._source.name!r}: text_encoder{suffix} gives NaN or infinity in "
                f"{self._dtype(suffix)[0]}: use guidance text_dtype float32"
            )
        return hidden, other

    def _evaluate(self, suffix: str, placement: Placement, tokens: Any) -> tuple[Tensor, Tensor]:
        encoder = self._load(suffix, placement)
        device = self._device if placement != "cpu" else torch.device("cpu")
        masked = not self._two and (
            self._is_t5(suffix) or self._configs[suffix].get("use_attention_mask", False) is True
        )
        with torch.no_grad():
            output = encoder(
                tokens.input_ids.to(device),
                attention_mask=tokens.attention_mask.to(device) if masked else None,
                output_hidden_states=self._two,
            )
            hidden, other = self._taken(suffix, output)
        return hidden.cpu(), other.cpu()

    def _taken(self, suffix: str, output: Any) -> tuple[Tensor, Tensor]:
        """Hidden states [n, tokens, width] of an encoder's output, and its first, which of two encoders is pooled."""
        return output.hidden_states[-2] if self._two else output[0], output[0]

    def _load(self, suffix: str, placement: Placement) -> Any:
        component, (name, dtype) = f"text_encoder{suffix}", self._dtype(suffix)
        if name == "int8":
            from transformers import BitsAndBytesConfig

            quantized = BitsAndBytesConfig(load_in_8bit=True)
            return self._source.load(component, dtype, quantization_config=quantized, device_map={"": self._device})
        encoder = self._source.load(component, dtype)
        if placement == "layers":
            from accelerate import cpu_offload

            return cpu_offload(encoder, execution_device=self._device)
        return encoder.to(self._device) if placement == "gpu" else encoder

    def _tokenize(self, texts: list[Prompt]) -> dict[str, Any]:
        """The inputs of each encoder, by suffix: "input_ids" and "attention_mask", both [n, tokens]."""
        tokenizers = {suffix: self._source.load(f"tokenizer{suffix}") for suffix in self._suffixes}
        lengths = {suffix: self._length(suffix, tokenizer) for suffix, tokenizer in tokenizers.items()}

        def fits(text: str, suffixes: Sequence[str]) -> bool:
            return all(
                len(
                    tokenizers[suffix](
                        self._read(suffix, text), max_length=lengths[suffix] + 1, truncation=True
                    ).input_ids
                )
                <= lengths[suffix]
                for suffix in suffixes
            )

        short: dict[str, list[str]] = {}
        # A T5 beside CLIP takes longer texts, and reads on where CLIP has to stop. Those of one kind read the same.
        for t5 in (False, True):
            group = [suffix for suffix in self._suffixes if self._is_t5(suffix) == t5]
            if group:
                kept, lost = shortened(texts, functools.partial(fits, suffixes=group))
                warn_of_lost_words(self._source.name, min(lengths[suffix] for suffix in group), lost)
                short |= dict.fromkeys(group, kept)
        return {
            suffix: tokenizer(
                [self._read(suffix, text) for text in short[suffix]],
                padding="max_length",
                max_length=lengths[suffix],
                truncation=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            for suffix, tokenizer in tokenizers.items()
        }

    def _length(self, suffix: str, tokenizer: Any) -> int:
        """Most tokens of a text, with those that mark its start and end."""
        if self._is_t5(suffix):
            return self.t5_tokens
        positions = self._configs[suffix].get("max_position_embeddings", 77)
        length = min(tokenizer.model_max_length, positions)
        if not isinstance(length, int) or length < _FEWEST_TOKENS:
            raise self._source.error(
                f"tokenizer{suffix} takes texts of {tokenizer.model_max_length!r} tokens, text_encoder{suffix} of "
                f"{positions!r}, at least {_FEWEST_TOKENS} are wanted"
            )
        return length

    def _read(self, suffix: str, text: str) -> str:
        """A text as the encoder was trained to read it, and with words that it was taught."""
        return text.lower().strip() if self._is_t5(suffix) else self._source.additions.words.replaced(text)

    def _is_t5(self, suffix: str) -> bool:
        return self._configs[suffix].get("model_type") == "t5"

    def _placements(self, suffix: str) -> list[Placement]:
        """Where to run an encoder, best first; the next is tried where the GPU's memory runs out."""
        if self._device.type != "cuda" or self._wanted_device == "cpu":
            return ["cpu"]
        name, dtype = self._dtype(suffix)
        if name == "int8" or self._wanted_device == "cuda":
            return ["gpu"]
        placements: list[Placement] = []
        if self._bytes(suffix, dtype) <= _FREE_SHARE * free_bytes(self._device):
            placements.append("gpu")
        if installed("accelerate"):
            placements.append("layers")
        elif not placements:
            warnings.warn(
                f"text_encoder{suffix} does not fit on {self._device} and runs on the CPU, which can take minutes: pip "
                "install accelerate, and it runs layer by layer on the GPU",
                stacklevel=2,
            )
        return [*placements, "cpu"]

    def _dtype(self, suffix: str) -> tuple[str, torch.dtype]:
        """The dtype's name and the torch dtype to load with; it depends on machine and config, not on free memory.

        Half precision is for the GPU: on a CPU that was asked for, CLIP runs in float32. T5's activations overflow in
        float16, so there it takes bfloat16, or float32 if the GPU has no bfloat16; and where float32 weights are too
        large for main memory, bfloat16 all the same, which torch emulates.
        """
        on_cpu = self._device.type != "cuda" or self._wanted_device == "cpu"
        bfloat16 = on_cpu or has_bfloat16(self._device)
        if self._wanted_dtype == "int8":
            return "int8", torch.bfloat16 if bfloat16 else torch.float16
        if self._wanted_dtype != "auto":
            return self._wanted_dtype, getattr(torch, self._wanted_dtype)
        # Not every transformers version can mask in float64.
        dtype = torch.float32 if self._model_dtype == torch.float64 else self._model_dtype
        if not self._is_t5(suffix):
            dtype = torch.float32 if on_cpu and dtype == torch.float16 else dtype
        elif dtype == torch.float16:
            dtype = torch.bfloat16 if bfloat16 else torch.float32
        if dtype == torch.float32 and self._is_t5(suffix):
            memory = _main_memory()
            if memory is not None and self._bytes(suffix, dtype) > _FREE_SHARE * memory:
                dtype = torch.bfloat16
        return str(dtype).removeprefix("torch."), dtype

    def _bytes(self, suffix: str, dtype: torch.dtype) -> int:
        return self._source.parameters(f"text_encoder{suffix}") * dtype.itemsize


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 rather than having torch emulate it."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _main_memory() -> int | None:
    """Bytes of main memory of this machine, None where the platform does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
