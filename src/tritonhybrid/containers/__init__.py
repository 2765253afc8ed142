"""How decoder layers are served: described, bound for a rollout, probed, released."""
