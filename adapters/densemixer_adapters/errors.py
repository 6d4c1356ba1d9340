"""The error that all doors share."""


class UnsupportedModelError(ValueError):
    """DenseMixer can't be attached to this model. The message names the module, the reason and the fix."""
