"""The embedded prior's text encoder: all-MiniLM-L6-v2 with a pruned vocabulary, shipped inside the package.

Source: Wang et al. 2020, MiniLM (arXiv 2002.10957); Reimers and Gurevych 2019, Sentence-BERT (arXiv 1908.10084).
Made by `tools/build_text_encoder.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .bert import Bert
from .quantize import load_network

WEIGHTS = Path(__file__).parent / "weights"
MAX_TOKENS = 20
# Token states leave MiniLM with a standard deviation of 0.444 (nine captions); cross-attention wants about one.
_TOKEN_SCALE = 1 / 0.444
WIDTH = 384


class TextEncoder(nn.Module):
    """Captions to token states and a pooled sentence vector.

    Args:
        folder: where `text_encoder.safetensors.gz` and `tokenizer.json` lie; default: the ones in the package.

    Raises:
        UserError: the weights are damaged, or not those of the network that they describe.
    """

    def __init__(self, folder: Path = WEIGHTS) -> None:
        super().__init__()
        from tokenizers import Tokenizer

        self.bert = load_network(folder / "text_encoder.safetensors.gz", Bert)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding(length=MAX_TOKENS, pad_id=self.tokenizer.token_to_id("[PAD]"))

    def fits(self, caption: str) -> bool:
        """Whether a caption has at most 20 tokens, those at its start and end included."""
        return not self.tokenizer.encode(caption).overflowing

    @torch.no_grad()
    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Encode captions; what goes beyond 20 tokens is cut.

        Returns:
            tokens `[n, 20, 384]` float32, zero where padded, and pooled `[n, 384]` float32: the mean over
            tokens, of unit length times sqrt(384), so that its entries have unit variance.
        """
        device = self.bert.embeddings.word_embeddings.weight.device
        encoded = self.tokenizer.encode_batch(list(captions))
        ids = torch.tensor([e.ids for e in encoded], device=device)
        mask = torch.tensor([e.attention_mask for e in encoded], device=device)
        weight = mask[..., None].float()
        tokens = self.bert(ids, mask) * weight
        pooled = nn.functional.normalize(tokens.sum(1) / weight.sum(1), dim=-1) * WIDTH**0.5
        return tokens * _TOKEN_SCALE, pooled
