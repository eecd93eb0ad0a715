"""What is wrong with an adapter, in one line."""


class AdapterError(ValueError):
    """An adapter that cannot be used, or not with this model; the message says why."""
