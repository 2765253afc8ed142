"""Where trainers plug in."""
