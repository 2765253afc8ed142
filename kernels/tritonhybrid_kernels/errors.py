"""Errors raised by the kernels; the root of the project's error tree."""

from __future__ import annotations


class TritonHybridError(Exception):
    """Root of every error this project raises on purpose."""


class KernelArgumentError(TritonHybridError, ValueError):
    """A launcher was called with a shape, dtype, device or stride it does not take."""
