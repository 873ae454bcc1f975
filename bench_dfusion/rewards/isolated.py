"""Rewards whose requirements conflict with the project's: scored by a process in an environment of their own.

The environment is built once, below $BENCH_DFUSION_HOME or ~/.cache/bench-dfusion, and used by every run. The process
(`scorer_worker.py`) talks over pipes; nothing is pickled and no port is opened. See docs/rewards.md.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import inspect
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bench_dfusion.errors import PluginError, UsageError, plain
from bench_dfusion.rewards import scorer_worker
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.util import files
from bench_dfusion.util.progress import Bar, bar, duration

LINES = 15  # of pip's or the worker's output in an error
TICK = 0.25  # s between looks at a process
ANSWER_LIMIT = 2**26  # bytes of one answer


class ScorerError(PluginError):
    """An environment that cannot be built, or a scorer that dies, hangs or answers wrongly; ends with its output."""


class IsolatedConfig(RewardConfig):
    """How a worker is run. These options change no score; a subclass adds those that do."""

    batch: int = Field(16, ge=1, description="images in one request to the worker (count)")
    timeout: float = Field(600.0, gt=0, description="longest time for one request (s)")
    start_timeout: float = Field(3600.0, gt=0, description="longest time to load the scorer, downloads included (s)")
    restarts: int = Field(2, ge=0, description="new workers for one request after a crash (count)")
    python: str | None = Field(
        None, description="the environment's interpreter, python3.11 say (default: the scorer's)"
    )


class IsolatedReward(Reward):
    """A reward scored in an environment of its own.

    requirements   what pip installs there; exact versions, so that a score stays what it is
    worker         the file of the scorer's module (see `scorer_worker`), beside the class's own
    python         an interpreter on PATH, python3.11 say; None: the one that runs this
    located_by     options that say where the weights are: in the fingerprint the hashes of the scorer's `weights` stand for them
    """

    requirements: ClassVar[tuple[str, ...]]
    worker: ClassVar[str]
    python: ClassVar[str | None] = None
    located_by: ClassVar[frozenset[str]] = frozenset()
    Config: ClassVar[type[RewardConfig]] = IsolatedConfig
    by_batch = True
    config: IsolatedConfig

    def __init__(self, config: IsolatedConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        self.module = Path(inspect.getfile(type(self))).parent / self.worker
        if not self.module.is_file():
            raise UsageError(f"reward {self.name}: no worker file {self.module}")
        self.environment = build(self.name, self.requirements, config.python or self.python)
        self._options = config.model_dump(mode="json", exclude=set(IsolatedConfig.model_fields))
        self._worker: Worker | None = None
        with bar(f"load {self.name}", 1) as progress:
            self._hello = self._start(progress)
            progress.advance(1)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B] for images uint8 [B, H, W, 3]. Raises ScorerError; non-finite scores are passed on."""
        scores: list[float] = []
        for i in range(0, len(images), self.config.batch):
            part = images[i : i + self.config.batch].contiguous().numpy()
            texts = list(prompts[i : i + self.config.batch])
            answer = self._ask({"shape": list(part.shape), "prompts": texts}, part.tobytes())
            found = answer.get("scores")
            if not isinstance(found, list) or len(found) != len(texts):
                what = f"{len(found)} scores" if isinstance(found, list) else "no scores"
                raise ScorerError(f"reward {self.name}: the worker returned {what} for {len(texts)} images")
            scores += found
        return torch.tensor(scores, dtype=torch.float32)

    def fingerprint(self) -> str:
        content = {
            "worker": files.sha256(self.module),
            "requirements": self.requirements,
            "versions": self.environment.versions,
            "config": {k: v for k, v in self._options.items() if k not in self.located_by},
            "weights": self._hello["weights"],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def versions(self) -> dict[str, str]:
        found = {"python": str(self._hello["python"]), **self.environment.versions}
        return {f"{self.name}/{package}": version for package, version in found.items()}

    def close(self) -> None:
        """End the worker; the next request starts another."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _start(self, progress: Bar | None = None) -> dict[str, Any]:
        """Start a worker; returns what it says once the scorer is loaded. Raises ScorerError."""
        self.close()
        worker = Worker(self.environment.python, self.module)
        self._worker = worker
        weakref.finalize(self, worker.close)
        try:
            hello = worker.ask(
                {"config": self._options, "device": str(self.device)},
                b"",
                self.config.start_timeout,
                lambda: progress.advance(0, worker.last_line()) if progress else None,
            )
        except Stopped as stopped:
            self.close()
            raise ScorerError(f"reward {self.name}: the scorer {stopped} while it was loading{worker.said()}") from None
        except BaseException:
            self.close()
            raise
        if hello.get("protocol") != scorer_worker.PROTOCOL or hello.get("versions") != self.environment.versions:
            self.close()
            raise ScorerError(
                f"reward {self.name}: {self.environment.folder} was changed after it was built; remove it to build it anew"
            )
        return hello

    def _ask(self, header: Mapping[str, Any], payload: bytes) -> dict[str, Any]:
        """A request's answer, from a new worker where one dies. Raises ScorerError."""
        for attempt in range(self.config.restarts + 1):
            if self._worker is None:
                self._hello = self._start()
            worker = self._worker
            assert worker is not None
            try:
                answer = worker.ask(header, payload, self.config.timeout)
            except Hung as hung:
                self.close()
                raise ScorerError(
                    f"reward {self.name}: the scorer {hung}; raise reward.timeout or lower reward.batch{worker.said()}"
                ) from None
            except Stopped as stopped:
                self.close()
                if attempt == self.config.restarts:
                    times = f" ({attempt + 1} times on one batch)" if attempt else ""
                    raise ScorerError(f"reward {self.name}: the scorer {stopped}{times}{worker.said()}") from None
                print(f"reward {self.name}: the scorer {stopped}; starting another", file=sys.stderr)
                continue
            except BaseException:  # between a request and its answer, Ctrl-C say: the next answer would be this one's
                self.close()
                raise
            if "error" in answer:
                lines = [plain(line) for line in str(answer["error"]).splitlines()[-LINES:]]
                raise ScorerError("\n  ".join([f"reward {self.name}: the scorer failed", *lines]))
            return answer
        raise AssertionError("unreachable")


class Stopped(Exception):
    """The worker ended, or did what makes it useless; the message goes after "the scorer"."""


class Hung(Stopped):
    """The worker gave no answer in time."""


class Worker:
    """A scorer's process, in a session of its own so that its children end with it."""

    def __init__(self, python: Path, module: Path):
        self.process = subprocess.Popen(
            [python, "-I", scorer_worker.__file__, str(module.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._lines: deque[str] = deque(maxlen=200)
        self._listener = threading.Thread(target=_listen, args=(self.process.stderr, self._lines), daemon=True)
        self._listener.start()

    def ask(
        self, header: Mapping[str, Any], payload: bytes, timeout: float, tick: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """The answer's header; `tick` is called while it waits. Raises Hung or Stopped, after which only `close` works."""
        rest = memoryview(scorer_worker.message(header, payload))
        got = bytearray()
        lengths = scorer_worker.LENGTHS
        end = time.monotonic() + timeout
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise Hung(f"gave no answer in {duration(timeout)}")
            readable, writable, _ = select.select([self._out], [self._in] if rest else [], [], min(left, TICK))
            if writable:
                try:
                    rest = rest[os.write(self._in, rest[:65536]) :]
                except BrokenPipeError:  # it has ended, which the next read says
                    rest = rest[:0]
            if readable:
                part = os.read(self._out, 65536)
                if not part:
                    raise Stopped(self._ending())
                got += part
            if len(got) >= lengths.size:
                size, more = lengths.unpack_from(got)
                if size + more > ANSWER_LIMIT:
                    raise Stopped("wrote something else than an answer")
                if len(got) >= lengths.size + size + more:
                    try:
                        answer = json.loads(bytes(got[lengths.size : lengths.size + size]))
                    except ValueError:
                        raise Stopped("wrote something else than an answer") from None
                    return dict(answer)
            if tick is not None:
                tick()

    def close(self) -> None:
        """End the worker and its children; no zombie stays."""
        process = self.process
        assert process.stdin and process.stdout and process.stderr
        if process.stdin.closed:
            return
        with suppress(OSError):
            process.stdin.close()  # at the end of its stdin a worker ends itself and its children
        with suppress(subprocess.TimeoutExpired):
            process.wait(2.0)
        with suppress(ProcessLookupError, PermissionError):  # those of one that crashed, or does not listen
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._listener.join(2.0)
        process.stdout.close()
        if not self._listener.is_alive():
            process.stderr.close()

    def said(self) -> str:
        """The worker's last lines on stderr, as the end of an error."""
        self._listener.join(1.0)
        lines = [plain(line) for line in list(self._lines)[-LINES:]]
        return "; its last lines:\n  " + "\n  ".join(lines) if lines else "; it said nothing"

    def last_line(self) -> str:
        return plain(self._lines[-1])[:80] if self._lines else ""

    def _ending(self) -> str:
        try:
            status = self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"


def _listen(file: IO[bytes], lines: deque[str]) -> None:
    with suppress(OSError, ValueError):  # closed under it
        while line := file.readline(4096):
            if text := line.decode(errors="replace").strip():
                lines.append(text.split("\r")[-1])


@dataclass(frozen=True)
class Environment:
    """A built environment: its folder, its interpreter and what is installed."""

    folder: Path
    python: Path
    versions: dict[str, str]


def home() -> Path:
    """Where environments live."""
    return files.cache() / "scorers"


def build(name: str, requirements: Sequence[str], python: str | None = None) -> Environment:
    """The environment that holds `requirements`, built where there is none yet.

    Safe against other processes that build it too, and against a kill: it counts once `complete.json` is in it.
    Raises UsageError where the interpreter does not run, ScorerError with the tail of pip's output.
    """
    interpreter, version = _interpreter(name, python)
    folder = _folder(name, requirements, version)
    found = _complete(folder)
    if found is not None:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock"), name) as lock:
        found = _complete(folder)  # another process may have built it meanwhile
        if found is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)  # one that was killed in the middle
        try:
            with bar(f"environment of {name}", 1) as progress:
                _install(name, folder, interpreter, requirements, progress, lock)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    found = _complete(folder)
    assert found is not None
    return found


def _folder(name: str, requirements: Sequence[str], version: str) -> Path:
    key = hashlib.sha256(json.dumps([version, *requirements]).encode()).hexdigest()[:16]
    return home() / f"{name}-{key}"


def _install(name: str, folder: Path, interpreter: Path, requirements: Sequence[str], progress: Bar, lock: int) -> None:
    """Make the environment, install and mark it complete. The parts inherit the lock, so that it holds while one runs."""
    own_pip = importlib.util.find_spec("pip") is None  # as in an environment that uv made
    python = folder / "bin" / "python"
    make = [interpreter, "-I", "-m", "venv", folder, *([] if own_pip else ["--without-pip"])]
    pip = [python, "-I", "-m", "pip"] if own_pip else [sys.executable, "-m", "pip", "--python", python]
    quiet = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    for step in (make, [*pip, "install", *quiet, "--", *requirements]):
        lines, status = _watch([str(word) for word in step], progress, lock)
        if status:
            tail = "\n  ".join(plain(line) for line in lines[-LINES:])
            raise ScorerError(
                f"reward {name}: its environment cannot be built ({' '.join(requirements)}); the output's end:\n  {tail}"
            )
    done = subprocess.run([python, "-I", scorer_worker.__file__, "--versions"], capture_output=True, check=True)
    content = {"requirements": list(requirements), "versions": json.loads(done.stdout)}
    files.write_json(folder / "complete.json", content)
    progress.advance(1)


def _watch(words: list[str], progress: Bar, lock: int) -> tuple[list[str], int]:
    """Run a command to its end, its last line beside the bar; returns its last lines and status. It ends with this
    process, even where that one is killed: its stdin is a pipe from here, which `scorer_worker` watches."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    lines: deque[str] = deque(maxlen=200)
    process = subprocess.Popen(
        [sys.executable, "-I", scorer_worker.__file__, "--run", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=clean,
        pass_fds=[lock],
        start_new_session=True,
    )
    assert process.stdin and process.stdout
    listener = threading.Thread(target=_listen, args=(process.stdout, lines), daemon=True)
    listener.start()
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(TICK)
                break
            progress.advance(0, plain(lines[-1])[:80] if lines else "")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    listener.join(5.0)
    process.stdout.close()
    process.stdin.close()
    return list(lines), process.returncode


def _complete(folder: Path) -> Environment | None:
    python = folder / "bin" / "python"
    try:
        versions = files.read_json(folder / "complete.json")["versions"]
    except (OSError, ValueError, KeyError):
        return None
    return Environment(folder, python, versions) if python.exists() else None


def _interpreter(name: str, python: str | None) -> tuple[Path, str]:
    """An interpreter's path and version. Raises UsageError where it is missing or does not run."""
    if python is None:
        return Path(sys.executable), sys.version
    path = shutil.which(python)
    if path is None:
        raise UsageError(f"reward {name} needs {python}, which is not on PATH: install it")
    done = subprocess.run([path, "-I", "-c", "import sys; print(sys.version)"], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UsageError(f"reward {name} needs {python}, and {path} does not run: {last}")
    return Path(path), done.stdout.strip()


@contextmanager
def _locked(path: Path, name: str) -> Iterator[int]:
    """Hold a lock file, waiting for who has it; yields its descriptor."""
    with open(path, "w") as file:
        if not _flock(file):
            with bar(f"another process builds the environment of {name}", 1) as progress:
                while not _flock(file):
                    time.sleep(TICK)
                    progress.advance(0)
        yield file.fileno()


def _flock(file: IO[str]) -> bool:
    """Take the lock if nobody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
