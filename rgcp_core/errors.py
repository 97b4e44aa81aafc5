"""The errors that this project raises on purpose; anything else is a defect."""


class RgcpError(Exception):
    """Base of all expected errors. The message says what was expected, what came and what to do."""


class UserError(RgcpError):
    """The call or its settings cannot work: an unknown preset, K beyond T, an output inside the input. Exit code 2."""


class UnitError(RgcpError):
    """One photo or one face cannot be processed; the run goes on without it.

    `reason` is a short snake_case word for the manifest (`truncated`, `too_small`); the message is the sentence.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
