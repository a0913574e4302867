"""The error of a run that memory has run out for."""

from __future__ import annotations

from dreamfusion_fast.errors import UserError


class DoesNotFitError(UserError):
    """A step does not fit into memory, with everything saved that can be. The run is as it was before the step."""
