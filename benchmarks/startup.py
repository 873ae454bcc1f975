"""How long the command takes to answer at the prompt: `python benchmarks/startup.py [--out FILE] [--times N]`.

CPU seconds of a new process for each kind of answer, the least of N tries, and as a multiple of starting Python itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

COMMANDS = (
    ("--help",),
    ("list",),
    ("list", "algorithms"),
    ("list", "tracks"),
    ("list", "algorithms", "dpo"),
    ("run", "--algo", "dpoo", "--reward", "clip"),
    ("run", "--algo", "dpo", "--reward", "clop"),
    ("run", "--algo", "dpo", "--reward", "clip", "--track", "mikro"),
    ("run", "--algo", "dpo", "--reward", "clip", "--set", "algo.betta=1"),
    ("sweep", "micro", "--algo", "dpo,ddpoo", "--reward", "clip"),
    ("leaderboard", "nowhere"),
)


def cpu_seconds(words: list[str]) -> float:
    """What a process and its children cost."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="write what was measured as JSON")
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()

    def least(words: list[str]) -> float:
        return min(cpu_seconds(words) for _ in range(given.times))

    bare = least([sys.executable, "-c", "pass"])
    print(f"{bare:6.2f} s        python -c pass", flush=True)
    lines = []
    for words in COMMANDS:
        seconds = least([sys.executable, "-m", "bench_dfusion", *words])
        print(f"{seconds:6.2f} s {seconds / bare:5.0f} ×  bench-dfusion {' '.join(words)}", flush=True)
        lines.append({"words": words, "cpu_seconds": round(seconds, 3), "of_python": round(seconds / bare, 1)})
    if given.out:
        given.out.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
