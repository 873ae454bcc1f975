"""The command line as a process, on the embedded world with a tiny budget.

Importing what a run needs takes seconds, so `command` forks its processes from one that has it all imported, and so are
the processes that those start (`Forking`). What is read at import (`FRESH`) needs an interpreter of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

SETTINGS = [
    "track.model.autocast=null",  # bfloat16 is slow on CPUs that have none
    "track.sampler.steps=4",
    "track.budget.reward_queries=24",  # three rounds of drawn samples, two of D-Fusion's
    "track.budget.prompts_per_round=2",
    "track.budget.samples_per_prompt=4",
    "track.evaluation.images_per_prompt=2",
    'track.prompts.heldout=["a red circle", "two blue rings", "a red ring above a blue cross"]',
    'track.prompts.train=["three green rings", "a cyan square", "a red square and a blue ring"]',
    "track.prompts.validation=[]",
    "track.prompts.templates=null",
    "track.evaluation.base_images_per_prompt=null",
]
TINY = [f"--set={setting}" for setting in SETTINGS]
FRESH = (
    "PYTHON",
    "HF_",
    "OMP_",
    "BENCH_DFUSION_",
    "CUDA_",
    "WORLD_SIZE",
)  # how names of variables read at import begin
PATIENCE = 300.0  # s


def command(*words: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `bench-dfusion ...` in a process of its own and return what it said."""
    whole = {**os.environ, "COLUMNS": "160", **(env or {})}
    if any(name.startswith(FRESH) for name in env or {}):
        program = [sys.executable, "-m", "bench_dfusion.cli", *words]
        return subprocess.run(program, cwd=cwd, env=whole, capture_output=True, text=True, timeout=PATIENCE)
    with tempfile.NamedTemporaryFile("w+") as out, tempfile.NamedTemporaryFile("w+") as err:
        code = _imported().run({"words": words, "cwd": str(cwd), "env": whole, "out": out.name, "err": err.name})
        return subprocess.CompletedProcess(["bench-dfusion", *words], code, out.read(), err.read())


class Imported:
    """A process that has imported what runs need, and forks one that runs for each order it reads."""

    def __init__(self) -> None:
        environment = {**os.environ, "COLUMNS": "160"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        atexit.register(self.process.kill)

    def run(self, order: dict[str, object]) -> int:
        """The exit status, minus the signal's number of a process that was killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)
            raise subprocess.TimeoutExpired(str(order["words"]), PATIENCE)
        return int(self.process.stdout.readline())


@functools.cache
def _imported() -> Imported:
    return Imported()


def _serve() -> None:
    import bench_dfusion.reward_models.clip

    import bench_dfusion.cli
    import bench_dfusion.cli.display
    import bench_dfusion.runs.rescore
    import bench_dfusion.runs.trainer  # noqa: F401

    subprocess.Popen = Forking  # type: ignore[assignment, misc]
    answers = os.fdopen(os.dup(1), "w")
    while line := os.read(0, 1 << 20).decode():  # one order at a time: its asker waits for the answer
        while not line.endswith("\n"):
            line += os.read(0, 1 << 20).decode()
        child = os.fork()
        if not child:
            _run(json.loads(line))
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _run(order: dict[str, object]) -> None:
    """Be `bench-dfusion WORDS`, and end."""
    from bench_dfusion import cli

    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, order["out"], os.O_WRONLY),
        (2, order["err"], os.O_WRONLY),
    ):
        os.dup2(os.open(str(name), flags), number)
    os.chdir(str(order["cwd"]))
    _become(cli.main, ["bench-dfusion", *order["words"]], order["env"])  # type: ignore[misc, arg-type]


class Forking(subprocess.Popen):  # type: ignore[type-arg]
    """`python -m bench_dfusion.…` as a fork of this process; any other program as always."""

    def __init__(self, args: list[str], **options: Any) -> None:
        if args[:2] == [sys.executable, "-m"] and args[2].startswith("bench_dfusion."):
            sys.stdout.flush()  # what lies in a buffer would be written by both
            sys.stderr.flush()
            main = functools.partial(runpy.run_module, args[2], run_name="__main__", alter_sys=True)
            environment = options.get("env") or dict(os.environ)
            # Called when the streams are in place; what would close the rest and read the environment comes after it.
            options["preexec_fn"] = lambda: _begin(main, args[2:], environment, options.get("pass_fds", ()))
        super().__init__(args, **options)


def _begin(main: Callable[[], object], words: list[str], environment: dict[str, str], fds: Sequence[int]) -> NoReturn:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
    gc.enable()
    warnings.filterwarnings("ignore", ".*found in sys.modules.*", RuntimeWarning)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _become(main, words, environment)


def _become(main: Callable[[], object], words: list[str], environment: dict[str, str]) -> NoReturn:
    """Be a process of this program, with these arguments and this environment, and end."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = words
        main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
