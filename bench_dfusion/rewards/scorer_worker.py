"""Runs a scorer in an environment of its own, for `bench_dfusion.rewards.isolated`; the standard library is all it needs.

    python -I scorer_worker.py MODULE.py     answer requests on stdin with scores on stdout
    python -I scorer_worker.py --versions    print the installed packages as JSON
    python -I scorer_worker.py --run WORDS   run a command that ends when stdin does: with whoever started it

A message is two big-endian lengths (4 and 8 bytes), a JSON header and raw bytes. MODULE.py defines
`load(config, device)`, which returns an object with `score(images, prompts)`: one number for each image. Images are
PIL images or, where Pillow is not installed, memoryviews of bytes [H, W, 3]. Its `weights`, if it has them, are the
paths of the files it loaded.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import queue
import re
import signal
import struct
import subprocess
import sys
import threading
import traceback

PROTOCOL = 1
LENGTHS = struct.Struct(">IQ")


def versions():
    """Versions of the environment's packages, without those that install packages."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name.lower() not in ("pip", "setuptools", "wheel"):
            found[name.lower().replace("_", "-")] = distribution.version
    return dict(sorted(found.items()))


def message(header, payload=b""):
    """A message's bytes."""
    text = json.dumps(header).encode()
    return LENGTHS.pack(len(text), len(payload)) + text + payload


def read(file):
    """The next message as (header, payload), None at the end of the file."""
    lengths = file.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    size, rest = LENGTHS.unpack(lengths)
    text, payload = file.read(size), file.read(rest)
    if len(text) < size or len(payload) < rest:
        return None
    return json.loads(text), payload


def images_of(payload, shape):
    """Raw bytes [B, H, W, 3] as the B images a scorer gets."""
    count, height, width, channels = shape
    size = height * width * channels
    parts = [memoryview(payload)[i * size : (i + 1) * size] for i in range(count)]
    try:
        from PIL import Image
    except ImportError:
        return [part.cast("B", (height, width, channels)) for part in parts]
    return [Image.frombytes("RGB", (width, height), bytes(part)) for part in parts]


def load(path):
    """The scorer's module."""
    spec = importlib.util.spec_from_file_location("scorer", path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    sys.modules["scorer"] = module
    spec.loader.exec_module(module)
    return module


def digest(path):
    """The SHA-256 of a file: its name in the Hub's cache, else computed."""
    folder, name = os.path.split(os.path.realpath(path))
    if os.path.basename(folder) == "blobs" and re.fullmatch("[0-9a-f]{64}", name):
        return name
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**22):
            total.update(part)
    return total.hexdigest()


def receive(file, inbox):
    """Pass requests on; when the harness has gone, end this process and its children, whatever they do."""
    while True:
        found = read(file)
        if found is None:
            end()
        inbox.put(found)


def end():
    """End this process and its children."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def run(words):
    """The exit status of a command, which does not outlive the process that holds the other end of stdin, however that
    one ended. Descriptors are passed on: a lock holds while the command runs."""

    def watch():
        sys.stdin.buffer.read()
        end()

    threading.Thread(target=watch, daemon=True).start()
    return subprocess.run(words, stdin=subprocess.DEVNULL, close_fds=False).returncode


def main(path):
    # The protocol keeps the pipes to itself: a library's print goes to stderr, and stdin is empty.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def answer(header):
        answers.write(message(header))
        answers.flush()

    inbox: queue.Queue = queue.Queue()
    threading.Thread(target=receive, args=(requests, inbox), daemon=True).start()
    start, _ = inbox.get()
    scorer = load(path).load(start["config"], start["device"])
    weights = [digest(path) for path in getattr(scorer, "weights", [])]
    python = platform.python_version()
    answer({"protocol": PROTOCOL, "python": python, "versions": versions(), "weights": weights})
    while True:
        request, payload = inbox.get()
        try:
            scores = scorer.score(images_of(payload, request["shape"]), request["prompts"])
            answer({"scores": [float(score) for score in scores]})
        except Exception:
            answer({"error": traceback.format_exc()})


if __name__ == "__main__":
    if sys.argv[1] == "--versions":
        print(json.dumps(versions()))
    elif sys.argv[1] == "--run":
        sys.stdout.flush()
        os._exit(run(sys.argv[2:]) & 0xFF)  # the watching thread holds stdin: an ordinary exit would wait for it
    else:
        main(sys.argv[1])
