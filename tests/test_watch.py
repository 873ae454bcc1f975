"""What is shown of runs while they run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import boards
import pytest

from bench_dfusion.runs import status, watching
from bench_dfusion.util import files


def registered(folder: Path, seed: int) -> Path:
    """The directory of a cell that has no record yet."""
    record = boards.record(seed=seed)
    boards.register(folder, record)
    (path,) = [p for p in folder.rglob("cell.json") if json.loads(p.read_text())["resolved"]["seed"] == seed]
    return path.parent


def by_seed(folder: Path) -> dict[str, watching.Watched]:
    return {cell.name.rpartition(" ")[2]: cell for cell in watching.look(folder)}


def test_every_state_is_told_from_the_files_alone(tmp_path: Path) -> None:
    own = [registered(tmp_path, seed) for seed in range(7)]
    status.Reporter(own[1]).say("base", 0, 8)
    reporter = status.Reporter(own[2])
    reporter.say("train", 1, 8, 0.5, [0.1])
    reporter.say("train", 2, 8, 0.5, [0.1, 0.2])
    status.Reporter(own[3]).say("evaluate", 8, 8)
    status.Reporter(own[4]).say("train", 3, 8)
    content = json.loads((own[4] / status.FILE).read_text()) | {"updated": time.time() - 2 * watching.SILENT}
    (own[4] / status.FILE).write_text(json.dumps(content))
    (own[5] / "error.json").write_text('{"error": "out of [memory]"}')
    (own[6] / "cell.json").write_text("{")
    found = by_seed(tmp_path)
    assert [found[str(n)].state for n in range(6)] == ["waiting", "base", "training", "evaluating", "stopped", "error"]
    assert found["2"].said == "2 of 8 rounds" and found["2"].rises == (0.1, 0.2) and found["2"].left is not None
    assert found["5"].said == "out of [memory]"
    (damaged,) = [cell for cell in watching.look(tmp_path) if "cannot be read" in cell.said]
    assert damaged.state == "error"
    with files.locked(own[4] / ".lock", "busy"):
        assert by_seed(tmp_path)["4"].state == "training", "it holds its lock: it is slow, not stopped"


def test_what_has_a_record_is_over(tmp_path: Path) -> None:
    boards.leave(tmp_path, boards.record(), boards.record(seed=1, gains=None))
    for record in (boards.record(), boards.record(seed=1, gains=None)):
        boards.register(tmp_path, record)
    found = by_seed(tmp_path)
    assert found["0"].state == "finished" and "+0.250 [" in found["0"].said
    assert found["1"].state == "collapsed" and found["1"].said
    assert all(cell.over for cell in found.values())
    (path,) = [p for p in tmp_path.rglob("record.json") if json.loads(p.read_text())["seed"] == 0]
    status.Reporter(path.parent).say("train", 9, 16)
    with files.locked(path.with_name(".lock"), "busy"):
        assert by_seed(tmp_path)["0"].state == "training", "it goes on to a later rung"
    assert watching.headline(list(found.values())).startswith("2 of 2 over: 1 finished, 1 collapsed")


def test_the_sparkline_has_zero_in_its_scale() -> None:
    assert watching.sparkline([]) == "" and watching.sparkline([0.0, 0.0]) == "▁▁"
    assert watching.sparkline([0.0, 0.5, 1.0]) == "▁▅█" and watching.sparkline([0.5, 0.5]) == "██"
    assert watching.sparkline([-1.0, 0.0]) == "▁█" and len(watching.sparkline(range(100))) == 24


def test_the_command_shows_a_line_a_cell_and_a_page(tmp_path: Path, said) -> None:
    folder = registered(tmp_path / "runs", 0)
    (folder / "error.json").write_text('{"error": "<b>out</b>"}')
    done = said("watch", tmp_path / "runs", "--page", tmp_path / "page.html")
    assert done.status == 0 and "error <b>out</b>" in done.out and "1 of 1 over: 1 error" in done.out
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;out&lt;/b&gt;" in page and "refresh" not in page, "all is over"
    status.Reporter(registered(tmp_path / "runs", 1)).say("train", 1, 4)
    assert said("watch", tmp_path / "runs", "--once", "--page", tmp_path / "page.html").status == 0
    assert 'http-equiv="refresh"' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("nowhere",), "no run below nowhere"),
        ((".",), "no run below ."),
        ((".", "--page", "x.txt"), "x.txt is no page"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], expected: str, refused, tmp_path: Path) -> None:
    assert expected in refused("watch", *words, cwd=tmp_path)
