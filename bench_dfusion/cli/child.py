"""`python -m bench_dfusion.cli.child PARENT WORDS` is `bench-dfusion WORDS` that ends when its parent does.

A node's worker may be killed, and what it computes then would be for nobody.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from bench_dfusion.sweeps.launcher import GRACE


def end_with(parent: int) -> None:
    """End this process, as SIGTERM does, when its parent is another one: the kernel's, because its own is dead."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    sys.argv = ["bench-dfusion", *sys.argv[2:]]
    from bench_dfusion.cli import main

    main()
