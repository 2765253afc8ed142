"""Whole weights for the length of a rollout, training state untouched."""
