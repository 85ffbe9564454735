"""One exception for everything a user can put right, and how a program ends with it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in the options, the data or the surroundings.

    The message is one line that names the culprit; nobody needs the traceback.
    """


def run_main(main: Callable[[], int | None]) -> int:
    """Runs a program's main function and turns its ending into an exit code.

    Args:
        main: the program; its return value is the exit code, None means 0.

    Returns:
        The exit code: 2 after a `UserError`, 130 after Ctrl-C. In both cases one line went to
        the standard error.
    """
    try:
        return main() or 0
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume at the next row", file=sys.stderr)
        return 130
