"""The subcommands of ``cllm``, one module each. Heavy imports happen inside the functions, so that
``cllm --help`` answers at once."""
