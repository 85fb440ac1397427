"""How every `rhizome events` command ends, and how what is logged meanwhile looks."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

UNTIL_STOPPED = ("tail", "top", "stats", "record")
"""They run until they are stopped: Ctrl-C is how they end, and no failure."""

VERDICTS = ("verify", "diff", "replay")
"""Their exit code says whether all is right: 0 is not for what nobody has read to its end."""


class EventsGroup(TyperGroup):
    """The commands: Ctrl-C and readers that have had enough, as of `| head`, end them without a word."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        plain_log_lines()
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            if ctx.invoked_subcommand not in UNTIL_STOPPED:
                raise
            return None
        except BrokenPipeError:
            _forget_standard_output()
            raise typer.Exit(1 if ctx.invoked_subcommand in VERDICTS else 0) from None
        return result


def plain_log_lines() -> None:
    """Log lines on standard error look like the tools' own."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler and handler.stream is sys.stderr:
            handler.setFormatter(logging.Formatter("rhizome: %(message)s"))


def _forget_standard_output() -> None:
    """What is still to be written goes nowhere: it would be told at exit."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
