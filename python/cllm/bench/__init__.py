"""Ways to decode a model, each in a process of its own, on the same prompts in turn."""
