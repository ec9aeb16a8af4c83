"""What the command lines share: exit codes, and errors of one sentence."""

from __future__ import annotations

import argparse
from typing import NoReturn

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one sentence, without the usage of thirty options before it."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with `BAD_INPUT`."""
        self.exit(BAD_INPUT, f"error: {message}; see --help\n")
