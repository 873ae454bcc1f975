"""The table and what it says: refusals, rows, ranks, states, contrasts worked out by hand; CSV, Markdown, terminal."""

from __future__ import annotations

import csv
import io
import random
import re
from pathlib import Path

import numpy as np
import pytest
from boards import changed, digest, leave, place, record, register, track
from rich.console import Console

from bench_dfusion.cli import display
from bench_dfusion.errors import UsageError
from bench_dfusion.publish import dataset
from bench_dfusion.report import content, leaderboard_picture
from bench_dfusion.results import leaderboard, records, statistics, tables
from bench_dfusion.results.figures import COST, FIGURES, Figure
from bench_dfusion.results.leaderboard import Board
from bench_dfusion.results.records import Record

LEADERBOARDS = Path(__file__).parent.parent / "leaderboards"
WIGGLE = np.array([0.02, -0.02, 0.01, -0.01])  # sums to nothing over prompts


def runs(table: np.ndarray | list[list[float]], first: int = 0, **cell) -> list[Record]:
    """A record for each row of a table of gains [S, 4]."""
    return [record(gains=list(gains), seed=first + i, **cell) for i, gains in enumerate(table)]


def level(mean: float, seeds: int = 3) -> np.ndarray:
    """A table of gains [S, 4] of exactly this mean over seeds and prompts, and of a little variance."""
    seed = 0.01 * (np.arange(seeds) - (seeds - 1) / 2)
    return mean + seed[:, None] + WIGGLE * np.where(np.arange(seeds) % 2, -1, 1)[:, None]


def line_of(board: Board, **cell: str) -> dict:
    (line,) = [
        e for e in tables.table(board).to_dict("records") if all(e[name] == value for name, value in cell.items())
    ]
    return line


def shown(board: Board, width: int = 80) -> str:
    out = Console(width=width, file=io.StringIO(), force_terminal=False)
    display.board(board, out)
    return out.file.getvalue()


# What a board refuses


def test_tracks_never_share_a_board() -> None:
    with pytest.raises(ValueError, match=r"records of 2 different tracks never share a table: \['toy-v1', 'toy-v2'\]"):
        Board((record(), record(of=track(version=2))))
    with pytest.raises(ValueError, match="records of 2 different tracks"):
        Board((record(), record(of=track(seeds=4))))  # one name, another content


def test_a_cell_has_one_record_whatever_its_batch() -> None:
    for twin in (record(gains=(0.2, 0.2, 0.2, 0.2)), record(of=track(batch=7))):
        with pytest.raises(ValueError, match="the cell dpo/dfusion/clip/seed 0 has two records: a and b; keep one"):
            Board((record(), twin), paths=(Path("a"), Path("b")))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("verdicts.1.fingerprint", digest("other"), "the judge clip of dpo/dfusion/clip/seed 1 has other weights"),
        ("verdicts.1.per_prompt", [(0.5, 0.5)] * 3, "was judged by oracle on 4 prompts, clip on 3 prompts, other"),
        ("verdicts.0.judge", "other", "was judged by other on 4 prompts, clip on 4 prompts, other records by oracle"),
        ("verdicts", [], "was judged by no judge"),
    ],
)
def test_judges_are_the_same_everywhere(path: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Board((record(), changed(record(seed=1), path, value)))


def test_judges_in_another_order_are_refused() -> None:
    swapped = record(seed=1)
    swapped.verdicts.reverse()
    with pytest.raises(ValueError, match="cannot be compared"):
        Board((record(), swapped))


def test_a_refusal_is_one_line_of_the_command_without_escapes(tmp_path: Path, refused) -> None:
    hostile = record(algorithm="a\x1b[31m")
    leave(tmp_path / "runs", record())
    for name in ("x", "y"):
        records.write(tmp_path / "runs" / name / "record.json", hostile)
    message = refused("leaderboard", tmp_path / "runs")
    assert "a\\x1b[31m/dfusion/clip/seed 0 has two records" in message
    assert message.isprintable()


# Rows


def test_rows_are_grouped_by_configuration_and_named_by_what_differs() -> None:
    board = Board(
        (
            record(options={"beta": 1.0, "lr": 2.0}, seed=1),
            record(options={"beta": 1.0, "lr": 2.0}, seed=0),
            record(options={"beta": 5.0, "lr": 2.0}),
            record(options={"beta": 5.0, "lr": 2.0}, seed=1, of=track(batch=7)),  # the batch tells no rows apart
            record(builder="vanilla", options={"beta": 9.0}),
        )
    )
    found = [(r.builder, r.variant, [x.seed for x in r.records]) for r in leaderboard.rows(board)]
    assert found == [("dfusion", "algo.beta=1.0", [0, 1]), ("dfusion", "algo.beta=5.0", [0, 1]), ("vanilla", "", [0])]
    assert leaderboard.rows(board)[0].name == "dpo/dfusion/clip/algo.beta=1.0"


def test_an_option_that_only_one_configuration_has_tells_it_apart() -> None:
    board = Board((record(), record(options={"guard": "a,b"})))
    assert [r.variant for r in leaderboard.rows(board)] == ["", 'algo.guard="a,b"']


def test_a_label_has_no_room_for_a_long_value() -> None:
    both = [{f"a cat of breed {n}": ["cat"] for n in range(k)} for k in (5, 6)]
    labels = [r.variant for r in leaderboard.rows(Board(tuple(record(options={"items": items}) for items in both)))]
    assert len(set(labels)) == 2 and all(re.fullmatch(r"algo\.items=#[0-9a-f]{8}", label) for label in labels)


def test_a_row_shows_what_its_records_say() -> None:
    of_seed = [record(gains=[g] * 4, seed=i) for i, g in enumerate((0.1, 0.2, 0.3))]
    dear = changed(of_seed[2], "cost.seconds", {"sample": 10.0})
    line = line_of(Board((*of_seed[:2], changed(dear, "cost.peak_memory_mb", 400.0))))
    assert line["oracle base"] == 0.5 and line["oracle trained"] == pytest.approx(0.7)
    assert line["oracle gain"] == pytest.approx(0.2) and line["clip gain"] == pytest.approx(0.1)
    expected = statistics.paired_gain(np.repeat([[0.1], [0.2], [0.3]], 4, axis=1))
    assert line["oracle low"] == pytest.approx(expected.low) and line["oracle high"] == pytest.approx(expected.high)
    assert line["interval"] == "two-way t" and line["seeds"] == 3 and line["missing"] == line["failed"] == 0
    assert line["reward rise"] == pytest.approx(0.1) and line["diversity"] == 0.75 and line["kl"] == 0.01
    assert line["queries"] == 96 and line["evaluations"] == 1000
    assert line["seconds"] == pytest.approx((4 + 4 + 10) / 3) and line["memory"] == pytest.approx(200)


# Ranks


def test_a_clear_winner_is_first_and_ties_share_a_range() -> None:
    board = Board(
        (
            *runs(level(0.4), algorithm="a"),
            *runs(level(0.1) + WIGGLE, algorithm="b"),
            *runs(level(0.1) - WIGGLE, algorithm="c"),
            *runs(level(-0.3), algorithm="d"),
        )
    )
    frame = tables.table(board)
    assert dict(zip(frame["algorithm"], frame["rank"], strict=True)) == {"a": "1", "b": "2–3", "c": "2–3", "d": "4"}
    assert frame["algorithm"].iloc[0] == "a" and frame["algorithm"].iloc[-1] == "d"
    assert not frame["note"].any()


@pytest.mark.parametrize(
    "seeds", [(1, 2, 3), (0, 1, 2, 3), (0, 2, 4, 7)], ids=["others", "one more", "a choice of more"]
)
def test_a_row_of_other_seeds_has_no_rank_and_takes_nothing_from_the_others(seeds: tuple[int, ...]) -> None:
    own = [*runs(level(0.4), algorithm="a"), *runs(level(0.1), algorithm="b")]
    odd = [record(gains=[0.9] * 4, seed=s, algorithm="odd") for s in seeds]
    for board in (Board((*own, *odd)), Board((*odd, *own))):
        assert line_of(board, algorithm="a")["rank"] == "1" and line_of(board, algorithm="b")["rank"] == "2"
        line = line_of(board, algorithm="odd")
        assert line["rank"] == "" and line["note"] == "unranked: not exactly the track's 3 seeds, counted from 0"
        assert line["oracle gain"] == pytest.approx(0.9), "shown all the same"
        assert tables.markdown(board).count("| unranked |") == 1
    alone = tables.table(Board(tuple(odd)))
    assert list(alone["rank"]) == [""]


@pytest.mark.parametrize("seeds", [None, "three", 10**12])
def test_a_record_that_names_no_number_of_seeds_has_no_rank(seeds: object) -> None:
    board = Board(tuple(changed(r, "resolved.track.seeds", seeds) for r in runs(level(0.4))))
    assert list(tables.table(board)["rank"]) == [""]


def test_the_track_says_how_many_seeds_a_rank_takes() -> None:
    five = track(seeds=5)
    of_three = runs(level(0.4), algorithm="a", of=five)
    board = Board(
        (*of_three, *runs(level(0.1, 5), algorithm="b", of=five), *runs(level(0.3, 5), algorithm="c", of=five))
    )
    assert [line_of(board, algorithm=a)["rank"] for a in "abc"] == ["", "2", "1"]
    assert line_of(board, algorithm="a")["note"] == "unranked: not exactly the track's 5 seeds, counted from 0"


# States


def test_a_collapsed_run_makes_its_row_a_miss_below_all_others() -> None:
    board = Board(
        (
            *runs(level(0.9, 2), algorithm="a"),
            record(gains=None, algorithm="a", seed=2),
            *runs(level(-0.5), algorithm="b"),
            *runs(level(-0.9), algorithm="c"),
        )
    )
    frame = tables.table(board)
    assert list(frame["algorithm"]) == ["b", "c", "a"] and list(frame["rank"]) == ["1", "2", ""]
    line = line_of(board, algorithm="a")
    assert line["oracle gain"] == line["clip gain"] == -np.inf and line["failed"] == 1 and line["seeds"] == 3
    assert line["note"] == "miss: 1 of 3 runs collapsed or turned non-finite"
    assert "| miss | a | dfusion | clip | 3 | −∞ |" in tables.markdown(board)
    assert "miss" in shown(board) and "−∞" in shown(board)


def test_a_run_whose_first_score_is_not_finite_is_not_offline() -> None:
    board = Board((record(gains=None, queries=0, rounds=0),))
    assert line_of(board)["note"] == "miss: 1 of 1 runs collapsed or turned non-finite"
    assert "offline" not in tables.markdown(board) + shown(board)


def test_offline_rows_are_marked_and_ranked() -> None:
    board = Board((*runs(level(0.1), builder="kept", queries=0), *runs(level(0.4))))
    line = line_of(board, builder="kept")
    assert line["note"] == "offline: no reward query" and line["queries"] == 0 and line["rank"] == "2"
    (text,) = [e for e in tables.markdown(board).splitlines() if "| kept |" in e]
    assert "| offline |" in text
    assert re.search(r"2 +dpo .* offline$", shown(board), re.MULTILINE)


def test_a_row_trained_on_the_judge_that_ranks_is_a_ceiling() -> None:
    board = Board((*runs(level(0.9), reward="oracle"), *runs(level(0.1)), *runs(level(0.0), builder="vanilla")))
    line = line_of(board, reward="oracle")
    assert line["rank"] == "" and line["note"] == "ceiling: trained on the judge"
    assert tables.table(board).iloc[0]["reward"] == "oracle", "shown by its gain"
    # the second judge is the training reward of the others, and that is no ceiling
    assert line_of(board, builder="dfusion", reward="clip")["rank"] == "1"
    assert line_of(board, builder="vanilla")["rank"] == "2"


def test_fewer_than_three_seeds_are_a_checkpoint() -> None:
    line = line_of(Board(tuple(runs(level(0.4, 2)))))
    assert line["rank"] == "" and line["note"] == "checkpoint: 2 of 3 seeds" and line["interval"] == "BCa bootstrap"


def test_cells_without_a_record_make_a_row_incomplete(tmp_path: Path) -> None:
    leave(tmp_path, *runs(level(0.4)), *runs(level(0.1), builder="vanilla"))
    register(tmp_path, record(seed=3))
    register(tmp_path, record(seed=4), error="RuntimeError: [red]out of\x1b[2J memory")
    register(tmp_path, record(algorithm="kto", seed=0))
    register(tmp_path, record(builder="vanilla", seed=0))  # has a record: registered is no more than that
    (board,) = leaderboard.boards(tmp_path)
    line = line_of(board, algorithm="dpo", builder="dfusion")
    assert (line["rank"], line["seeds"], line["missing"]) == ("", 3, 2)
    assert line["note"] == "incomplete: 2 of 5 cells have no record, 1 ended in an error"
    assert line["oracle gain"] == pytest.approx(0.4), "what there is, is shown"
    assert line_of(board, builder="vanilla")["rank"] == "1"
    assert line_of(board, algorithm="kto")["note"] == "incomplete: 1 of 1 cells have no record"
    text = tables.markdown(board)
    assert "| incomplete | dpo | dfusion | clip | 3 of 5 | +0.400 [" in text
    assert "| incomplete | kto | dfusion | clip | 0 of 1 | – | – | – | – | – | – |" in text, "not offline"
    assert "dpo/dfusion/clip, seed 4: RuntimeError: [red]out of\\x1b[2J memory" in shown(board)
    assert "3/5" in shown(board)
    assert not len(tables.contrasts(board)), "an incomplete row has no effect to speak of"


def test_a_cell_that_finished_with_another_batch_is_not_missing(tmp_path: Path) -> None:
    leave(tmp_path, record())
    for batch in (7, 8):
        register(tmp_path, record(of=track(batch=batch)))
        register(tmp_path, record(seed=1, of=track(batch=batch)))
    (board,) = leaderboard.boards(tmp_path)
    assert [u.seed for u in board.unfinished] == [1]


def test_a_board_of_unfinished_cells_alone_has_a_table(tmp_path: Path) -> None:
    register(tmp_path, record())
    (board,) = leaderboard.boards(tmp_path)
    assert board.judges == [] and board.track == "toy-v1"
    assert "incomplete" in tables.markdown(board) and "0/1" in shown(board)
    assert tables.csv(board).count("\n") == 2


def test_a_damaged_registration_is_one_line(tmp_path: Path) -> None:
    register(tmp_path, record())
    cell = place(tmp_path, record()).parent / "cell.json"
    for damaged in ("{", "[]", '{"resolved": {}}'):
        cell.write_text(damaged)
        with pytest.raises(UsageError, match=r"cell\.json describes no cell"):
            leaderboard.boards(tmp_path)


def test_each_track_has_a_board(tmp_path: Path) -> None:
    leave(tmp_path, record(), record(of=track(name="other")), record(seed=1, of=track(seeds=4)))
    assert [b.track for b in leaderboard.boards(tmp_path)] == ["other-v1", "toy-v1", "toy-v1"]


# What D-Fusion adds


def test_contrasts_are_the_paired_differences_by_hand() -> None:
    rng = np.random.default_rng(0)
    values = {(a, b): rng.normal(0.1 * (a == "x"), 0.1, (4, 4)).round(3) for a in "xyz" for b in ("dfusion", "vanilla")}
    board = Board(tuple(r for (a, b), table in values.items() for r in runs(table, algorithm=a, builder=b)))
    frame = tables.contrasts(board)
    assert list(frame["algorithm"]) == ["x", "y", "z", "mean of 3"] and set(frame["seeds"]) == {4}
    pairs = [(values[a, "dfusion"], values[a, "vanilla"]) for a in "xyz"]
    pairs.append((np.mean([d for d, _ in pairs], 0), np.mean([v for _, v in pairs], 0)))
    for line, (ours, control) in zip(frame.to_dict("records"), pairs, strict=True):
        expected = statistics.compare(ours, control)
        assert line["difference"] == pytest.approx((ours - control).mean())
        for column, value in (
            ("low", expected.difference.low),
            ("high", expected.difference.high),
            ("p", expected.p),
        ):
            assert line[column] == pytest.approx(value), (line["algorithm"], column)
    # Holm by hand: the smallest of four times 4, the next times 3, ..., never falling, at most 1
    ordered = frame.sort_values("p")
    largest = 0.0
    for factor, p, holm in zip((4, 3, 2, 1), ordered["p"], ordered["holm"], strict=True):
        largest = max(largest, min(1.0, factor * p))
        assert holm == pytest.approx(largest)
    assert not frame["ceiling"].any()


def test_contrasts_pair_the_seeds_both_have() -> None:
    """Unpaired means would give −0.2; on the shared seeds 1 to 3 it is +0.1."""
    ours, control = level(0.3, 4), level(0.2, 4)
    ours[0], control[3] = -0.9, 0.2
    board = Board((*runs(ours), *runs(control, first=1, builder="vanilla")))
    (line,) = tables.contrasts(board).to_dict("records")
    assert line["seeds"] == 3
    assert line["difference"] == pytest.approx((ours[1:] - control[:3]).mean())


def test_fewer_than_three_shared_seeds_give_no_contrast() -> None:
    x = [*runs(level(0.3), algorithm="x"), *runs(level(0.1), algorithm="x", builder="vanilla")]
    y = [*runs(level(0.3), algorithm="y"), *runs(level(0.1), first=1, algorithm="y", builder="vanilla")]
    assert list(tables.contrasts(Board((*x, *y)))["algorithm"]) == ["x"]
    assert not len(tables.contrasts(Board(tuple(y)))) and "effect" not in tables.markdown(Board(tuple(y)))
    only = tables.contrasts(Board(tuple(runs(level(0.3)))))
    assert list(only.columns)[-2:] == ["holm", "ceiling"] and not len(only)


def test_the_mean_is_over_seeds_that_all_algorithms_share() -> None:
    cells = []
    for algorithm, first in (("x", 0), ("y", 1)):
        for builder, mean in (("dfusion", 0.3), ("vanilla", 0.1)):
            cells += runs(level(mean, 4), first=first, algorithm=algorithm, builder=builder)
    frame = tables.contrasts(Board(tuple(cells)))
    assert dict(zip(frame["algorithm"], frame["seeds"], strict=True)) == {"x": 4, "y": 4, "mean of 2": 3}
    apart = [r for r in cells if r.algorithm == "x" or r.seed > 1]
    assert list(tables.contrasts(Board(tuple(apart)))["algorithm"]) == ["x", "y"], "two shared seeds: no mean"


def test_rewards_have_contrasts_of_their_own_and_ceilings_are_marked() -> None:
    cells = [
        r
        for reward, mean in (("clip", 0.1), ("oracle", 0.4))
        for builder in ("dfusion", "vanilla")
        for r in runs(level(mean * (1 + (builder == "dfusion"))), builder=builder, reward=reward)
    ]
    frame = tables.contrasts(Board(tuple(cells)))
    assert list(zip(frame["reward"], frame["ceiling"], strict=True)) == [("clip", False), ("oracle", True)]
    assert frame["difference"].tolist() == pytest.approx([0.1, 0.4])
    assert "| dpo | oracle (ceiling) | 3 | +0.400 [" in tables.markdown(Board(tuple(cells)))


# Bytes


def test_the_same_records_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    found = [r for _, r in records.find(LEADERBOARDS)]
    expected = [f(Board(tuple(found))) for f in (tables.csv, tables.markdown)]
    assert expected[0].count("\n") == 1 + len({(r.algorithm, r.builder, r.reward) for r in found})
    shuffled = random.Random(0).sample(found, len(found))
    for number, each in enumerate(shuffled):  # other directories: found in another order
        records.write(tmp_path / str(number) / "record.json", each)
    (board,) = leaderboard.boards(tmp_path)
    assert [r.cell_hash for r in board.records] != [r.cell_hash for r in found]
    assert [f(board) for f in (tables.csv, tables.markdown)] == expected


HOSTILE = [
    "=1+1",
    "+1|<b>",
    "-1`x`",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "a|b",
    "<img src=x>",
    "`code`\n| x |",
    "a\x1b[2Jb",
    "$x$",
]


def test_a_spreadsheet_runs_nothing_of_a_csv() -> None:
    of = track(evaluation={"judges": ["=oracle", "clip"]})
    board = Board(tuple(record(algorithm=a, builder=b, of=of) for a, b in zip(HOSTILE, HOSTILE[::-1], strict=True)))
    text = tables.csv(board)
    header, *lines = csv.reader(io.StringIO(text))
    assert len(lines) == len(HOSTILE) and {len(line) for line in lines} == {len(header)}
    assert "'=oracle gain" in header and "\x1b" not in text
    for value in [v for line in (header, *lines) for v in line]:
        assert not value.startswith(("=", "+", "@", "\t", "\r", "\n")), value
        assert not value.startswith("-") or float(value) < 0
    assert {"'=1+1", "'+1|<b>", "'@SUM(A1)", "a|b"} <= {line[1] for line in lines}


def test_markdown_shows_names_as_text() -> None:
    of = track(evaluation={"judges": ["or|acle", "clip"]})
    cells = [
        r
        for name in HOSTILE
        for b in ("dfusion", "vanilla")
        for r in runs(level(0.1), algorithm=name, builder=b, of=of)
    ]
    text = tables.markdown(Board(tuple(cells)))
    grids = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(t) for t in grids] == [2 + 2 * len(HOSTILE), 2 + len(HOSTILE) + 1]
    for lines in grids:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, "no name makes or ends a cell"
    assert "<" not in text and "\x1b" not in text
    assert not re.search(r"(?<!\\)[`$]", text)
    assert "+1\\|&lt;b&gt;" in text and "+0.100 [" in text


def test_the_terminal_shows_names_as_text() -> None:
    cells = [record(algorithm=a, builder="[red]b") for a in HOSTILE]
    text = shown(Board(tuple(cells)))
    assert "[red]b" in text and "\x1b" not in text and "a\\x1b[2Jb" in text


def test_the_published_table_and_picture_are_those_of_the_published_records(tmp_path: Path) -> None:
    (board,) = leaderboard.boards(LEADERBOARDS)
    readme = (LEADERBOARDS / "README.md").read_text(encoding="utf-8")
    assert f"--markdown -->\n{tables.markdown(board)}<!-- end of table -->" in readme
    leaderboard_picture(board, tmp_path / "now.svg")
    assert (tmp_path / "now.svg").read_bytes() == (LEADERBOARDS / "micro-v1.svg").read_bytes()


def test_a_new_figure_is_described_once_and_shown_everywhere(monkeypatch, request) -> None:
    updates = Figure(
        "most updates", "int64", "Updates", COST, "optimiser steps of a run (count)",
        lambda row: max((r.cost.updates for r in row.records), default=0), ",.0f", ".0f",
    )  # fmt: skip
    FIGURES.append(updates)
    request.addfinalizer(FIGURES.pop)
    monkeypatch.setattr(dataset, "LEADERBOARD", dataset.leaderboard_columns())
    (one,) = runs(level(0.1))[:1]
    board = Board((one,))
    count = one.cost.updates
    assert tables.table(board)["most updates"].tolist() == [count]
    assert "most updates" in tables.csv(board).splitlines()[0].split(",")
    head, _, row = (line.split("|") for line in tables.markdown(board).splitlines()[:3])
    assert row[head.index(" updates ")].strip() == str(count)
    (published,) = dataset._leaderboard(board)
    assert published["most_updates"] == count
    page = content.of_board(board, content.Pictures())
    (column,) = [c for c in page["columns"] if c.key == "most updates"]
    assert column.help == updates.meaning and page["rows"][0]["cells"]["most updates"].text == f"{count:,}"
