"""Errors that users can cause; their messages name the cause and the way out."""

INTERRUPTED = 130  # exit code, as in shells
LONGEST_REASON = 200  # characters of a message from another library


class TopKExpertsError(Exception):
    """A failure that a user can cause or fix; the CLI prints it in one line and exits with 1."""

    exit_code = 1


class InputError(TopKExpertsError, ValueError):
    """An input was refused before any work was done; the CLI exits with 2."""

    exit_code = 2


def one_line(error: BaseException | str) -> str:
    """The message of another library's error, without line breaks and shortened.

    Args:
        error: that was raised, or its message.
    """
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
