"""All that runs on your machine: train, rehearse, generate, demonstrate. Imports `kernel/`, which never imports it."""

import sys
from types import TracebackType

_excepthook = sys.excepthook


def _end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Answer Ctrl-C while a command still imports its modules as `local.base.console.run` does afterwards."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    _excepthook(kind, error, trace)


sys.excepthook = _end_quietly
