"""Launch points: each parses its arguments, composes, and calls one function of the package."""

from __future__ import annotations

from rcm.core.stop_signal import answer_while_importing

answer_while_importing(__name__)
