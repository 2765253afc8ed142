"""The demo: a reinforcement-learning run, start to finish, on one DeepSpeed engine."""
