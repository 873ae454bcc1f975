"""A process of a local sweep, which runs one cell after another as `bench-dfusion run` would.

`python -m bench_dfusion.cli.worker FD` reads an order a line on stdin, {"words": arguments of `bench-dfusion run`,
"log": where the cell speaks to}. After a cell that left a record it writes {"status": its exit status} to FD, and waits
for the next order. After any other it ends as `bench-dfusion run` does, by the same status: what went wrong may be in
this process. So it does where the cell ran code of others (a plugin, a function), whose modules would remember it. At the
end of stdin, when the sweep has ended, however, it ends too.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any


def main(answers: int) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # importing takes seconds before the command does so
    os.set_inheritable(answers, False)
    loaded: Any = None
    with os.fdopen(os.dup(0)) as orders:
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        try:
            for line in orders:
                order = json.loads(line)
                _speak_to(order["log"])
                # Only now: what cannot be imported is said where the sweep looks.
                from bench_dfusion import cli, registry
                from bench_dfusion.runs.loaded import Loaded

                loaded = loaded or Loaded()
                sys.argv = ["bench-dfusion", *order["words"]]
                try:
                    cli.main(loaded)
                except SystemExit as ended:
                    if ended.code not in (0, 1) or registry.others:
                        raise
                    status = ended.code
                _speak_to(os.devnull)
                os.write(answers, json.dumps({"status": status}).encode() + b"\n")
        except KeyboardInterrupt:  # outside of the command: nobody listens, or it was still importing
            print("\nstopped; the same command goes on", file=sys.stderr)
            sys.exit(130)


def _speak_to(path: str) -> None:
    """From now on stdout and stderr, also those of libraries in C, are appended to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for own in (1, 2):
        os.dup2(file, own)
    os.close(file)


if __name__ == "__main__":
    main(int(sys.argv[1]))
