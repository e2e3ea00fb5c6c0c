"""The exceptions a caller acts on differently; everything else is a plain ``ValueError`` or ``TypeError``."""


class SourceUnavailable(OSError):
    """A source or a store did not answer; the same call may succeed later."""


class DataIntegrityError(ValueError):
    """A file is missing, truncated or altered; the message names it, its expected hash and the remedy."""


class CheckpointMismatch(ValueError):
    """A folder or checkpoint was written by another configuration."""


class NonFiniteLoss(ArithmeticError):
    """Training diverged; the message names the step and the images of the batch."""


class ParityError(ValueError):
    """An exported model does not equal the model it was exported from."""
