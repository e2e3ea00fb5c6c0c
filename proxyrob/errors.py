"""The exceptions a caller acts on differently; everything else is a plain ``ValueError`` or ``TypeError``."""

import pickle


class SourceUnavailable(OSError):
    """A source or a store did not answer; the same call may succeed later."""


class DataIntegrityError(ValueError):
    """A file is missing, truncated or altered; the message names it, its expected hash and the remedy."""


class CheckpointMismatch(ValueError):
    """A folder or checkpoint was written by another configuration."""


class NonFiniteLoss(ArithmeticError):
    """Training diverged; the message names the step and the images of the batch."""


class OutOfMemory(RuntimeError):
    """The memory of a GPU or of the host ran out; the same call may succeed with fewer images at once."""


class ParityError(ValueError):
    """An exported model does not equal the model it was exported from."""


def as_portable(error: Exception) -> Exception:
    """The error itself if it survives being sent to another process, else one that says the same."""
    try:
        returned = pickle.loads(pickle.dumps(error))  # noqa: S301  (written on the same line)
        return error if type(returned) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")
    except Exception:  # whatever a foreign exception's own pickling raises, its text is still worth sending
        return RuntimeError(f"{type(error).__name__}: {error}")
