"""Classes and settings that a pipeline may name. It is a stranger's, so both are chosen from lists."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "BertModel")
_TOKENIZERS = (
    *("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"),
    *("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast"),
)
_CLASSES = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
    "transformer": ("diffusers", ("SD3Transformer2DModel", "FluxTransformer2DModel")),
    **{f"text_encoder{suffix}": ("transformers", TEXT_ENCODERS) for suffix in ("", "_2", "_3")},
    **{f"tokenizer{suffix}": ("transformers", _TOKENIZERS) for suffix in ("", "_2", "_3")},
}
# What a text encoder's configuration may say. Others name code, kernels or quantisation to be fetched or run.
_ENCODER_FIELDS = (
    "model_type vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads "
    "max_position_embeddings hidden_act layer_norm_eps attention_dropout initializer_factor initializer_range "
    "pad_token_id bos_token_id eos_token_id decoder_start_token_id tie_word_embeddings use_cache is_encoder_decoder "
    "d_model d_kv d_ff num_layers num_decoder_layers num_heads relative_attention_num_buckets "
    "relative_attention_max_distance dropout_rate layer_norm_epsilon feed_forward_proj "
    "hidden_dropout_prob attention_probs_dropout_prob type_vocab_size position_embedding_type"
)
# Of a tokenizer's; others name files.
_TOKENIZER_FIELDS = (
    "bos_token eos_token unk_token pad_token sep_token cls_token mask_token additional_special_tokens "
    "added_tokens_decoder add_prefix_space add_bos_token add_eos_token clean_up_tokenization_spaces errors extra_ids "
    "model_max_length do_lower_case do_basic_tokenize strip_accents tokenize_chinese_chars legacy "
    "padding_side truncation_side"
)
# SDXL has 1,680 tensors of weights, and no size in a published configuration comes near the other limit.
_MOST_TENSORS, _LARGEST_NUMBER = 5_000, 10**6


def check_class(component: str, library: str, class_name: str) -> None:
    """Raise ValueError unless the pipelines that are served have this class there. Nothing is imported."""
    if component in _CLASSES:
        home, served = _CLASSES[component]
        if library != home or class_name not in served:
            raise ValueError(
                f"{component} is of class {class_name} of {library}, wanted is {' or '.join(served)} of {home}"
            )


def component_class(component: str, library: str, class_name: str) -> Any:
    """The class of a model or tokenizer; raises ValueError as `check_class` does, and where there is none installed."""
    check_class(component, library, class_name)
    if component not in _CLASSES:
        raise ValueError(f"{component} is not loaded")
    found = getattr(importlib.import_module(library), class_name, None)
    if found is None:
        raise ValueError(f"the installed {library} has no class {class_name}")
    return found


def check_numbers(config: Any, name: str = "") -> None:
    """Raise ValueError for a number that no size of a network is."""
    if isinstance(config, (dict, list)):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            check_numbers(value, name or str(key))
    elif isinstance(config, int) and abs(config) > _LARGEST_NUMBER:
        raise ValueError(f"{name[:60]} is {config}, want at most {_LARGEST_NUMBER}")


def model_settings(model_class: Any, library: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model's configuration that describes a network."""
    if library == "transformers":
        return {key: value for key, value in config.items() if key in _ENCODER_FIELDS.split()}
    known = inspect.signature(model_class.__init__).parameters.keys() - {"self"}
    return {"_class_name": model_class.__name__} | {key: value for key, value in config.items() if key in known}


def tokenizer_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a tokenizer's configuration that names no files and no code."""
    return {key: value for key, value in config.items() if key in _TOKENIZER_FIELDS.split()}


def skeleton(model_class: Any, library: str, settings: dict[str, Any]) -> torch.nn.Module:
    """A model without weights, on torch's meta device; raises what its class raises, and ValueError if it is huge."""
    with torch.device("meta"), _bounded():
        if library == "diffusers":
            return model_class.from_config(settings).eval()
        return model_class(model_class.config_class.from_dict(settings)).eval()


@contextmanager
def _bounded() -> Iterator[None]:
    """Refuse a model with too many tensors while it is made, which could take hours otherwise."""
    thread, count = threading.get_ident(), 0

    def register(module: torch.nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > _MOST_TENSORS:
            raise ValueError(f"more than {_MOST_TENSORS} tensors of weights")

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()
