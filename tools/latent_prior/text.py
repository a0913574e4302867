"""The package's text encoder as diffusers' pipelines want one: a transformers `BertModel` and a tokenizer folder.

The package scales token states to about unit variance and sets them to zero where a caption is padded. The scale goes
into the last layer norm. The padding does not: diffusers hands its U-Nets whatever the encoder says of padding tokens,
so that is what the latent prior is trained on. At all other tokens both encoders agree, up to float16 storage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamfusion_fast.guidance.models.embedded.text_encoder import _TOKEN_SCALE, MAX_TOKENS, TextEncoder

CLASSES = {"text_encoder": "BertModel", "tokenizer": "PreTrainedTokenizerFast"}


class FolderTextEncoder(nn.Module):
    """Captions to token states, as a diffusers pipeline computes them.

    Args:
        bert: a transformers `BertModel`.
        tokenizer: its `PreTrainedTokenizerFast`.
    """

    def __init__(self, bert: Any, tokenizer: Any) -> None:
        super().__init__()
        self.bert, self.tokenizer = bert.eval().requires_grad_(False), tokenizer

    @classmethod
    def from_package(cls, weights: Path, dtype: torch.dtype = torch.float16) -> FolderTextEncoder:
        """From `text_encoder.safetensors.gz` and `tokenizer.json`; weights are rounded to `dtype`, kept as float32."""
        from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

        source = TextEncoder(weights).bert
        # Read by diffusers' pipelines and by PromptEncoder: without it padding would be attended to.
        config = BertConfig(**source.config | {"use_attention_mask": True})
        bert = BertModel(config)
        missing, unexpected = bert.load_state_dict(source.state_dict(), strict=False)
        if unexpected or any(not name.startswith("pooler.") for name in missing):
            raise ValueError(f"weights: {weights} does not hold a BERT, missing {missing}, unexpected {unexpected}")
        with torch.no_grad():
            last = bert.encoder.layer[-1].output.LayerNorm
            last.weight.mul_(_TOKEN_SCALE)
            last.bias.mul_(_TOKEN_SCALE)
            # Nothing reads the pooled output, but transformers would fill it at random if it were not stored.
            for parameter in bert.pooler.parameters():
                parameter.zero_()
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(weights / "tokenizer.json"), model_max_length=MAX_TOKENS, **names
        )
        return cls(bert.to(dtype).float(), tokenizer)

    @classmethod
    def from_folder(cls, folder: Path) -> FolderTextEncoder:
        """From a pipeline folder."""
        from transformers import BertModel, PreTrainedTokenizerFast

        bert = BertModel.from_pretrained(folder / "text_encoder", local_files_only=True).float()
        return cls(bert, PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"))

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write `text_encoder` and `tokenizer` of a pipeline folder; this encoder's weights are rounded to `dtype`."""
        self.bert.to(dtype).save_pretrained(folder / "text_encoder")
        self.bert.float()
        self.tokenizer.save_pretrained(folder / "tokenizer")

    @torch.no_grad()
    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token states `[n, 20, 384]` float32, of padding tokens too, and the first of them `[n, 384]`."""
        device = self.bert.embeddings.word_embeddings.weight.device
        encoded = self.tokenizer(
            list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        mask = encoded.attention_mask.to(device)
        tokens = self.bert(input_ids=encoded.input_ids.to(device), attention_mask=mask).last_hidden_state
        return tokens, tokens[:, 0]
