"""Where the `rhizome` command begins: Ctrl-C ends it without a traceback even while it is still being imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Import the commands and run one."""
    try:
        from deploy.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
