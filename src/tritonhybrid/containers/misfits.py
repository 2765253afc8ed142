"""How code fails that does not fit a model: its path is given up, not the call."""

from __future__ import annotations

# Anything else is a fault, and not for the probe to hide.
MISFITS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
