"""Collect Jacobi trajectories: prompts, the model's responses, cleaning, states, shards."""
