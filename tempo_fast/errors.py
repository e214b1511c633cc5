"""The two ways a run ends early that a user can do something about."""


class InputError(Exception):
    """Bad input or configuration. The message is one sentence that names the file and the field; exit code 2."""


class Interrupted(Exception):
    """The run was asked to stop and its state is resumable. ``exit_code`` is 130 (SIGINT) or 75 (SIGTERM)."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code
