"""Turn a model into a consistency LLM: collect its Jacobi trajectories, then train on them.

Kou et al. 2024, "CLLMs: Consistency Large Language Models" (arXiv 2403.00835); the packed forward
and the noise schedule follow the idea of arXiv 2512.14681.
"""
