"""The one error this package raises on bad input."""


class KernelError(ValueError):
    """Arguments of an operation do not fit together; the message says what was found and what was expected."""
