"""Sweeps on a real Ray cluster of several node processes on this machine, where nodes are killed and come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import TINY

from bench_dfusion.results import records
from bench_dfusion.util import files

# Long enough for a node to die in the middle; notes what it scored, so that work done twice is seen.
SLOW = """
import hashlib, os, time
from bench_dfusion.reward_models.oracle import Oracle

class Slow(Oracle):
    name = "slow"
    summary = "an oracle that takes its time"
    def score(self, images, prompts):
        time.sleep(float(os.environ["SLOW"]))
        with open(os.environ["SCORED"], "a") as file:
            file.write(hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest() + "\\n")
        return super().score(images, prompts)
"""
WORDS = ("sweep", "micro", "--algo", "ddpo", "--builder", "vanilla", "--reward", "slow", "--seeds", "2")
LONG = "--set=track.budget.reward_queries=48"
ROUNDS = 6
# Seconds rather than a minute until a silent node counts as dead; nothing here needs Ray's politeness of nice 15.
SYSTEM = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
    "worker_niceness": 0,
}
NODE = {"include_dashboard": False, "object_store_memory": 80_000_000}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install -e '.[test,ray]'"),
]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs and two nodes of one CPU; whatever they started is gone at the end."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SLOW", "3")
    monkeypatch.setenv("SCORED", str(tmp_path / "scored"))
    (tmp_path / "slow.py").write_text(SLOW)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "_system_config": SYSTEM})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, **NODE)
        yield made
    finally:
        below = psutil.Process().children(recursive=True)
        for process in below:
            process.resume()
        made.shutdown()
        for process in below:
            if process.is_running():
                process.kill()


def sweep(where: Path, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench_dfusion.cli", *WORDS, "--plugin", "slow.py", *TINY, LONG, *map(str, words)]
    return subprocess.Popen(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def on(cluster: Any, where: Path, *words: object) -> subprocess.Popen[str]:
    return sweep(where, "--launcher", "ray", "--ray-address", cluster.address, *words)


def until(true: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def rounds_of(checkpoint: Path) -> int:
    return int(files.load_tensors(checkpoint)[1]["progress"]["round"])


def far(shared: Path) -> list[Path]:
    """The tries that have left a checkpoint of a round in the storage."""
    return [p.parent for p in shared.glob("*/*/try-*/checkpoint.safetensors") if rounds_of(p) > 0]


def processes_of(words: str) -> list[psutil.Process]:
    """The cell's process, and the worker of Ray that started it, of a try's words."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:  # it has ended meanwhile
            continue
        if "bench_dfusion.cli.child" in line and words in " ".join(line):
            found = [process, process.parent()]
    return found


def results(out: Path) -> dict[int, dict[str, Any]]:
    return {record.seed: record.comparable() for _, record in records.find(out)}


def calm(where: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Any]]:
    """The records of a local sweep that nothing disturbs."""
    monkeypatch.setenv("SCORED", str(where / "scored calmly"))
    monkeypatch.setenv("SLOW", "0")
    process = sweep(where, "--out", "calm")
    assert process.wait(300) == 0, process.communicate()
    found = results(where / "calm")
    assert found.keys() == {0, 1}
    return found


def test_a_killed_node_loses_a_part_of_a_try_and_no_cell(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    process = on(cluster, tmp_path, "--out", "ours", "--storage", f"file://{shared}")
    cell = until(lambda: far(shared), process)[0].parent
    assert len(list((tmp_path / "ours").rglob("cell.json"))) == 2, "both are registered"
    seed = cell.name.split("-s")[-1].split("-")[0]
    own, worker = processes_of(f"--seed {seed} ")
    raylet = worker.parent()
    node = next(n for n in cluster.worker_nodes if raylet.pid in {p.process.pid for p in n.all_processes["raylet"]})
    raylet.kill()
    worker.kill()
    cluster.worker_nodes.remove(node)
    second = until(lambda: list(cell.glob("try-0002-*/checkpoint.safetensors")), process)[0]
    assert rounds_of(second) > 0, "it goes on from the first try's checkpoint"
    assert not own.is_running(), "the killed worker's cell has ended itself"
    output, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert f"seed {seed}: its node was lost" in said and "finished, oracle" in said and "ceiling" in output
    scored = Counter((tmp_path / "scored").read_text().splitlines())
    assert len(scored) == 2 * ROUNDS and sum(scored.values()) < 3 * ROUNDS, "rounds since the last copy, not all"
    assert results(tmp_path / "ours") == calm(tmp_path, monkeypatch)


def test_a_node_back_from_the_dead_changes_nothing(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = on(cluster, tmp_path, "--out", "ours")
    shared = tmp_path / "ours" / ".storage"
    old = until(lambda: far(shared), process)[0]
    seed = old.parent.name.split("-s")[-1].split("-")[0]
    raylet = processes_of(f"--seed {seed} ")[1].parent()
    frozen = [raylet, *raylet.children(recursive=True)]
    for part in frozen:
        part.suspend()
    until(lambda: list(old.parent.glob("try-0002-*/checkpoint.safetensors")), process)
    for part in frozen:
        part.resume()
    _, alive = psutil.wait_procs(frozen, timeout=60)
    assert not alive, "all of the node ends itself"
    assert not (old / "record.json").exists()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert not shared.exists(), "what was copied is removed"
    assert results(tmp_path / "ours") == calm(tmp_path, monkeypatch)


def test_two_sweeps_on_one_storage_run_no_cell_twice_and_both_have_all_records(cluster: Any, tmp_path: Path) -> None:
    os.environ["SLOW"] = "0"
    shared = tmp_path / "shared"
    one = on(cluster, tmp_path, "--out", "one", "--storage", shared)
    until(lambda: list(shared.glob("*/*/lease.json")), one)
    two = on(cluster, tmp_path, "--out", "two", "--storage", shared)
    for process in (one, two):
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert results(tmp_path / "one") == results(tmp_path / "two") and len(results(tmp_path / "one")) == 2
    scored = Counter((tmp_path / "scored").read_text().splitlines())
    assert len(scored) == 2 * ROUNDS and set(scored.values()) == {1}


def test_a_stopped_sweep_goes_on_locally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SCORED", str(tmp_path / "scored"))
    (tmp_path / "slow.py").write_text(SLOW)
    process = sweep(tmp_path, "--launcher", "ray", "--out", "ours")  # a cluster of its own
    until(lambda: far(tmp_path / "ours" / ".storage"), process)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped; the same command goes on" in output, said
    psutil.wait_procs(below, timeout=20)
    assert not [p for p in below if p.is_running()], "the cluster and the cells have ended too"
    monkeypatch.setenv("SLOW", "0")
    process = sweep(tmp_path, "--out", "ours")
    assert process.wait(300) == 0, process.communicate()
    scored = Counter((tmp_path / "scored").read_text().splitlines())
    assert len(scored) == 2 * ROUNDS and sum(scored.values()) <= 2 * ROUNDS + 2, "a round of each at most was lost"
    assert results(tmp_path / "ours") == calm(tmp_path, monkeypatch)
