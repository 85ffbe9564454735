"""The one error that a bad checkpoint or an unknown model name raises."""


class CheckpointError(ValueError):
    """A model that cannot be had: not found, damaged, incomplete or unsupported.

    The message is one line and names the file, the key or the tensor at fault.
    """
