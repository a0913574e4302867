"""The base class of estimators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class AbstractEstimator(nn.Module):
    """Tells where along rays samples are worth taking. Those of other projects derive from it."""

    _dummy: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_dummy", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the estimator is."""
        return self._dummy.device

    def sampling(self, *args: Any, **kwargs: Any) -> Any:
        """Where the samples of rays lie."""
        raise NotImplementedError(f"{type(self).__name__} defines no sampling")

    def update_every_n_steps(self, *args: Any, **kwargs: Any) -> Any:
        """Update the estimator; called in each training step."""
        raise NotImplementedError(f"{type(self).__name__} defines no update_every_n_steps")
