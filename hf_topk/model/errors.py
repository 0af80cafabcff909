"""What goes wrong on a user's side, as exceptions whose message names the cause and the way out."""

INTERRUPTED = 130  # exit code, as shells have it
LONGEST_REASON = 200  # characters of somebody else's message


class TopKExpertsError(Exception):
    """Something that a user can cause or cure went wrong; the CLI prints it in one line and exits with 1."""

    exit_code = 1


class InputError(TopKExpertsError, ValueError):
    """An input was refused before any work was done; the CLI exits with 2."""

    exit_code = 2


def one_line(error: BaseException) -> str:
    """Somebody else's message, for a line of our own: without line breaks, and not too long.

    Args:
        error: what was raised.
    """
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
