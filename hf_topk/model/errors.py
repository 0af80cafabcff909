"""What goes wrong on a user's side, as exceptions whose message names the cause and the way out."""

INTERRUPTED = 130  # exit code, as shells have it


class TopKExpertsError(Exception):
    """Something that a user can cause or cure went wrong; the CLI prints it in one line and exits with 1."""

    exit_code = 1


class InputError(TopKExpertsError, ValueError):
    """An input was refused before any work was done; the CLI exits with 2."""

    exit_code = 2
