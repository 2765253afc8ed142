"""The command line: ``demo``, ``generate``, ``doctor``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tritonhybrid.commands import demo, doctor, generate
from tritonhybrid.errors import TritonHybridError

USAGE_ERROR = 2
INTERRUPTED = 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: Words after the program's name; None takes this process's own.

    Returns:
        The options; ``run`` is the command's function.
    """
    parser = argparse.ArgumentParser(
        prog="tritonhybrid",
        description="Train and generate with one DeepSpeed engine.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (demo, generate, doctor):
        command.add_parser(commands)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words after the program's name; None takes this process's own.

    Returns:
        Exit code: the command's; 2 with one line on stderr for a mistake of the user's; 130
        after Ctrl-C.
    """
    began_at = time.time()
    options = parse(arguments)
    options.began_at = began_at
    try:
        code: int = options.run(options)
    except TritonHybridError as error:
        sys.stderr.write(f"tritonhybrid: {error}\n")
        return USAGE_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("tritonhybrid: interrupted\n")
        return INTERRUPTED
    return code
