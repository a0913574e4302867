"""BERT (Devlin et al. 2019, arXiv 1810.04805) in plain torch, with the parameter names of transformers' `BertModel`.

The embedded prior does without the library because importing it takes longer than encoding a caption. A test holds the
two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bert(nn.Module):
    """Token ids to states.

    Args:
        config: `vocab_size`, `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `intermediate_size`,
            `max_position_embeddings`, `type_vocab_size` and `layer_norm_eps` of a `BertConfig`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.embeddings: Any = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config["vocab_size"], width),
                "position_embeddings": nn.Embedding(config["max_position_embeddings"], width),
                "token_type_embeddings": nn.Embedding(config["type_vocab_size"], width),
                "LayerNorm": nn.LayerNorm(width, eps),
            }
        )
        heads, inner = config["num_attention_heads"], config["intermediate_size"]
        layers = [_Layer(width, heads, inner, eps) for _ in range(config["num_hidden_layers"])]
        self.encoder: Any = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Of ids `[n, tokens]` int64, and where they are not padding, `[n, tokens]`: states `[n, tokens, width]`."""
        e = self.embeddings
        position = torch.arange(ids.shape[1], device=ids.device)
        segment = torch.zeros_like(ids)
        x = e.word_embeddings(ids) + e.token_type_embeddings(segment) + e.position_embeddings(position)
        x = e.LayerNorm(x)
        for layer in self.encoder.layer:
            x = layer(x, mask[:, None, None].bool())
        return x


class _Dense(nn.Module):
    """A linear layer, and a norm after the residual."""

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, outputs), nn.LayerNorm(outputs, eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self._heads = heads
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention: Any = nn.ModuleDict({"self": projections, "output": _Dense(width, width, eps)})
        self.intermediate: Any = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = _Dense(inner, width, eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        own = self.attention["self"]
        q, k, v = (own[name](x).unflatten(-1, (self._heads, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.attention["output"](mixed, x)
        return self.output(F.gelu(self.intermediate.dense(x)), x)
