"""The two ways a run ends early that a user can do something about."""


class InputError(Exception):
    """Bad input or configuration. The message is one sentence that names the file and the field; exit code 2."""


class Interrupted(Exception):
    """The run was asked to stop. ``exit_code`` is 130 (SIGINT) or 75 (SIGTERM). Where ``resumable``, what is done is
    kept, and the message ends in a word on what resumes the run: the command line puts the command after it."""

    def __init__(self, message: str, exit_code: int = 130, *, resumable: bool = True) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.resumable = resumable
