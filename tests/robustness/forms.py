"""The tests of this folder have a short form, and a long one that DREAMFUSION_FAST_LONG_TESTS=1 asks for."""

from __future__ import annotations

import os

LONG = os.environ.get("DREAMFUSION_FAST_LONG_TESTS", "0") not in ("", "0")
