"""Budgets as rungs: a run that goes on is the run that never stopped, and what it keeps of every rung it passed."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import boards
import numpy as np
import pytest
import safetensors.torch
from processes import SETTINGS
from rich.console import Console

import bench_dfusion
from bench_dfusion import report
from bench_dfusion.cli import display
from bench_dfusion.diffusion import lora
from bench_dfusion.errors import UsageError
from bench_dfusion.objectives.averages import WarmedUpEMA
from bench_dfusion.publish import dataset
from bench_dfusion.report import content
from bench_dfusion.results import checked_base, checks, leaderboard, merge, records, standings, tables
from bench_dfusion.results.leaderboard import Board
from bench_dfusion.results.records import Record
from bench_dfusion.runs import config, trainer
from bench_dfusion.runs.baseline import pictures_per_prompt
from bench_dfusion.sweeps import job, queue
from bench_dfusion.testing.fakes import fake_policy
from bench_dfusion.tracks.schema import read
from bench_dfusion.util import files

LADDER = [8, 16, 24]
OWN = [
    *SETTINGS,
    f"track.budget.rungs={LADDER}",
    'track.evaluation.judges=["oracle"]',
    "track.evaluation.base_images_per_prompt=4",
    "algo.learning_rate=0.05",
]
KEPT = (lora.FILE, checked_base.SCORES, "base_trained.png")


def run(out: Path, rung: int = 1, *settings: str) -> Record:
    names: dict[str, Any] = {"algo": "diffusion-dpo", "builder": "vanilla", "reward": "jpeg-compressibility"}
    return bench_dfusion.run(**names, settings=[*OWN, *settings], out=out, rung=rung)


def folder_of(out: Path) -> Path:
    ((path, _),) = records.find(out)
    return path.parent


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run to the last of three rungs at once (`whole`), and one in pieces (`pieces`, its record at rung 1 `first`): to
    the first, killed between the second one's evaluation and its record, to the last."""
    whole, pieces = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("pieces")
    found: dict[str, Any] = {"whole": whole, "pieces": pieces, "record": run(whole, 3), "first": run(pieces)}

    def kill(self: trainer.Run) -> Record:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Run, "_record", kill)
        with pytest.raises(Killed):
            run(pieces, 3)
    found["between"] = records.read(folder_of(pieces) / "record.json")
    checks.check(records.find(pieces))  # what lies beside it is another rung's already
    judged: list[int] = []
    evaluate = trainer.Run.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Run, "evaluate", lambda self, rung: judged.append(rung) or evaluate(self, rung))
        found["last"] = run(pieces, 3)
    found["judged"] = judged
    return found


# --- what a run makes of it


def test_a_run_in_pieces_is_the_run_that_never_stopped(runs: dict[str, Any]) -> None:
    whole, last = runs["record"], runs["last"]
    assert last.comparable() == whole.comparable()
    assert (last.rung, [r.rung for r in last.rungs]) == (3, [1, 2])
    assert runs["judged"] == [3], "what the killed run had found of rung 2 was not judged again"
    files_of = {
        name: {p.relative_to(folder_of(runs[name])).as_posix(): p for p in folder_of(runs[name]).rglob("*")}
        for name in ("whole", "pieces")
    }
    assert files_of["whole"].keys() == files_of["pieces"].keys()
    for name in (*KEPT, "triples.png", *(f"rungs/{n}/{kept}" for n in (1, 2) for kept in KEPT)):
        assert files.sha256(files_of["whole"][name]) == files.sha256(files_of["pieces"][name]), name
    assert not any(name.startswith("rungs/3") for name in files_of["whole"]), "the last one's are beside the record"


def test_the_record_of_a_rung_is_what_a_run_to_it_leaves(runs: dict[str, Any]) -> None:
    assert runs["between"] == runs["first"], "a kill on the way changes no record"
    for n, there in ((1, runs["first"]), (2, runs["last"].at(2)), (3, runs["last"])):
        at = runs["record"].at(n)
        assert at.comparable() == there.comparable() and at.provenance.scores_sha256 == there.provenance.scores_sha256
        assert at.cost.reward_queries == LADDER[n - 1] and len(at.rounds) == n
    assert runs["first"].at(2) is None and runs["record"].at(3) is runs["record"]
    loras = {runs["record"].at(n).provenance.lora_sha256 for n in (1, 2, 3)}
    assert len(loras) == 3, "every rung has its own"
    for n in (1, 2):
        folder = records.rung_folder(folder_of(runs["whole"]), n)
        assert files.sha256(folder / lora.FILE) == runs["record"].at(n).provenance.lora_sha256
        assert files.sha256(folder / checked_base.SCORES) == runs["record"].at(n).provenance.scores_sha256


def test_costs_count_the_evaluations_on_the_way(runs: dict[str, Any]) -> None:
    # By hand, one branch: a round draws 8 samples in 4 steps; its update reads each pair at one step of the network and
    # of the base. Judging draws 6 pictures and reads one of each prompt again for the KL, with both.
    evaluation = 6 * 4 + 3 * 4 * 2
    costs = [runs["record"].at(n).cost for n in (1, 2, 3)]
    rounds = [c.network_evaluations - n * evaluation for n, c in enumerate(costs, 1)]
    assert rounds[1] == 2 * rounds[0] and rounds[2] == 3 * rounds[0]
    assert [c.updates for c in costs] == [2, 4, 6]


def test_a_rung_that_was_reached_is_only_read(runs: dict[str, Any]) -> None:
    stamp = (folder_of(runs["whole"]) / "record.json").stat().st_mtime_ns
    assert run(runs["whole"], 1) == runs["record"], "as it is, further on"
    assert (folder_of(runs["whole"]) / "record.json").stat().st_mtime_ns == stamp


def test_going_on_without_its_checkpoint_is_refused(tmp_path: Path, runs: dict[str, Any]) -> None:
    cell = folder_of(runs["whole"]).relative_to(runs["whole"])
    records.write(tmp_path / cell / "record.json", runs["first"])
    with pytest.raises(
        UsageError, match=r"checkpoint.safetensors is missing, from which .* to rung 2: copy it there, or"
    ):
        run(tmp_path, 2)


@pytest.mark.parametrize(
    ("rung", "settings", "why"),
    [
        (4, (), "--rung 4: micro-custom-v2 has 3 rungs"),
        (2, ("track.budget.rungs=null",), r"--rung 2: micro-custom-v2 has no rungs \(budget.rungs\), only its budget"),
        (
            1,
            ("track.budget.rungs=[7,24]",),
            "the budget of 7 reward queries is less than one round of 8: raise the first",
        ),
        (
            1,
            ("track.budget.rungs=[8,16,23,24]",),
            "rungs 2 and 3 of .*, 16 and 23 reward queries, are less than one round",
        ),
    ],
)
def test_a_rung_that_cannot_be_is_one_line_before_compute(
    rung: int, settings: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=why):
        run(tmp_path, rung, *settings)
    assert not list(tmp_path.rglob("*"))


# --- its record, and what it cannot be

UP = boards.track(budget={"reward_queries": 144, "prompts_per_round": 2, "rungs": [48, 96, 144]})


def test_a_record_at_a_rung() -> None:
    record = boards.record(of=UP, gains=(0.3,) * 4, earlier=[(0.1,) * 4, (0.2,) * 4], queries=144)
    assert [s.rung for s in record.stages] == [1, 2, 3] and record.stages[2] is record
    assert [s.verdicts[0].gain.mean for s in record.stages] == pytest.approx([0.1, 0.2, 0.3])
    assert [(len(s.rounds), s.cost.reward_queries, len(s.rungs)) for s in record.stages] == [
        (1, 48, 0),
        (2, 96, 1),
        (3, 144, 2),
    ]
    for n, earlier in enumerate(([], [(0.1,) * 4])):
        gains = (0.1 * (n + 1),) * 4
        alone = boards.record(of=UP, gains=gains, earlier=earlier, trained=True, queries=144)
        assert record.at(n + 1) == alone
    plain = boards.record()
    assert plain.at(1) is plain and plain.at(2) is None and plain.stages == [plain]


def test_a_run_that_fails_keeps_the_rungs_before() -> None:
    record = boards.record(of=UP, gains=None, earlier=[(0.1,) * 4], rounds=1)
    assert record.status == "failed" and record.rung == 2
    first = record.at(1)
    assert first.status == "finished" and first.evidence is None and first.verdicts[0].gain.mean == pytest.approx(0.1)
    assert record.at(2) is record.at(3) is record and record.reached(3)


def climbed(**changes: Any) -> dict[str, Any]:
    record = boards.record(of=UP, gains=(0.3,) * 4, earlier=[(0.1,) * 4, (0.2,) * 4], queries=144, **changes)
    return record.model_dump(mode="json")


def raised(content: dict[str, Any]) -> None:
    """Gain and scores raised beyond what a judge gives, all means made to fit."""
    verdict = content["rungs"][0]["verdicts"][0]
    verdict["per_prompt"] = [(b, t + 0.5) for b, t in verdict["per_prompt"]]
    verdict["trained"] += 0.5
    verdict["gain"] |= {k: verdict["gain"][k] + 0.5 for k in ("mean", "low", "high")}
    verdict["templates"] = {t: (b, a + 0.5) for t, (b, a) in verdict["templates"].items()}


def other_base(content: dict[str, Any]) -> None:
    verdict = content["rungs"][1]["verdicts"][0]
    verdict["per_prompt"] = [(b - 0.25, t - 0.25) for b, t in verdict["per_prompt"]]
    for name in ("base", "trained"):
        verdict[name] -= 0.25
    verdict["templates"] = {t: (b - 0.25, a - 0.25) for t, (b, a) in verdict["templates"].items()}


def deleting(*names: str) -> Any:
    return lambda content: [content.pop(name) for name in names]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda c: c["rungs"][0]["verdicts"][0]["gain"].update(mean=0.15),
            "rung 1: verdict of oracle: gain.mean is 0.15",
        ),
        (raised, "rung 1: verdict of oracle: per_prompt: 1.1 is outside the judge's range"),
        (other_base, "rung 2: verdict of oracle: base: 0.25 is not that of rung 1, 0.5"),
        (lambda c: c["rungs"][1]["verdicts"].pop(), r"rung 2: verdicts of \['oracle'\], but the track's judges"),
        (lambda c: c["rungs"][1]["cost"].update(network_evaluations=999), "cost.network_evaluations: 1000 at a rung"),
        (
            lambda c: c["rungs"][0]["cost"]["seconds"].update(train=9.0),
            "cost.seconds.train: 9.0 at a rung, and less at",
        ),
        (lambda c: c["rungs"][0]["cost"].update(reward_queries=40), "rung 1: .* more reward queries than cost"),
        (lambda c: c["rungs"][0]["cost"].update(updates=3), "rung 1: cost.updates: 3, but 1 rounds"),
        (lambda c: c["rungs"][0].update(rounds=2), "rung 2: 2 rounds, after 2 of 3"),
        (lambda c: c["rungs"][1].update(rounds=4), "rung 2: 4 rounds, after 1 of 3"),
        (lambda c: c["rungs"][0].update(lora_sha256="none"), "rung 1: provenance.lora_sha256: 'none' is no SHA-256"),
        (lambda c: c["rungs"].pop(0), r"rungs \[2\], but a run to rung 3 passes \[1, 2\]"),
        (lambda c: c["rungs"].reverse(), r"rungs \[2, 1\], but a run to rung 3 passes"),
        (lambda c: c["rungs"].pop(), r"rungs \[1\], but a run to rung 3"),
        (lambda c: c.update(rung=4), "rung 4, but the track has 3"),
        (lambda c: c.update(rung=2, rungs=c["rungs"][:1]), "cost.reward_queries 144 is more than the budget of 96"),
        (deleting("rung", "rungs"), "rung and rungs are missing, but the track has rungs"),
        (deleting("rungs"), "rung and rungs are missing"),
    ],
)
def test_a_doctored_rung_is_refused_in_one_line(change: Any, why: str) -> None:
    content = climbed()
    checks.Checker().refuse(Record.model_validate(content))
    change(content)
    with pytest.raises(UsageError, match=why):
        checks.Checker().refuse(Record.model_validate(content))


def test_rungs_of_a_track_that_has_none_are_refused() -> None:
    with pytest.raises(UsageError, match="rung and rungs are there, and the track has no rungs"):
        checks.Checker().refuse(boards.record(rung=1, rungs=[]))


def test_a_rung_that_another_seed_trained_is_refused() -> None:
    spread = [0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17, 0.18]
    of = boards.track({f"{n} rings": "count" for n in range(8)}, budget=UP.budget.model_dump(mode="json"))
    one = boards.record(of=of, gains=[2 * g for g in spread], earlier=[spread], queries=144)
    two = boards.record(of=of, seed=1, gains=spread, queries=144)
    with pytest.raises(UsageError, match="trained scores are those of"):
        checks.check([(None, one), (None, two)])


def test_the_files_of_a_rung_are_held_against_it(runs: dict[str, Any], tmp_path: Path) -> None:
    copied = shutil.copytree(runs["whole"], tmp_path / "runs")
    checks.check(records.find(copied))
    file = records.rung_folder(folder_of(copied), 1) / checked_base.SCORES
    prompts, scores = checked_base.read_scores(file)
    scores["oracle"] = np.ones_like(scores["oracle"])
    checked_base.write_scores(file, prompts, scores)
    with pytest.raises(UsageError, match="rung 1: provenance.scores_sha256: .* holds other scores"):
        checks.check(records.find(copied))
    path = folder_of(copied) / "record.json"
    content = json.loads(path.read_text())
    content["rungs"][0]["scores_sha256"] = files.sha256(file)
    path.write_text(json.dumps(content))
    with pytest.raises(
        UsageError, match="rung 1: verdict of oracle: per_prompt: trained is not the mean of the scores"
    ):
        checks.check(records.find(copied))


# --- the track


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["track.budget.rungs=[8,8,4608]"], "budgets that rise"),
        (["track.budget.rungs=[0,4608]"], "each 1 or more"),
        (["track.budget.rungs=[8,16]"], r"the last is reward_queries, 4608, not 16"),
        (["track.budget.rungs=[4608]"], "track.budget.rungs: .* at least 2 items"),
    ],
)
def test_ladders_that_cannot_be(settings: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        config.resolve_track("micro", settings=settings)


def test_another_budget_drops_the_rungs_that_led_to_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('name = "a"\nversion = 1\nextends = "micro"\nbudget.rungs = [2304, 4608]\n')
    (tmp_path / "own.toml").write_text('name = "b"\nversion = 1\nextends = "base.toml"\nbudget.reward_queries = 576\n')
    base = config.resolve_track(str(tmp_path / "base.toml"))
    assert base.budget.ladder == (2304, 4608) and base.hash != config.resolve_track("micro").hash
    assert "rungs" not in read(tmp_path / "own.toml")["budget"]
    for source, setting, ladder in (
        ("own.toml", "track.batch=4", (576,)),
        ("base.toml", "track.budget.reward_queries=576", (576,)),
        ("base.toml", "track.budget.prompts_per_round=2", (2304, 4608)),
    ):
        assert config.resolve_track(str(tmp_path / source), settings=[setting]).budget.ladder == ladder
    both = ["track.budget.reward_queries=96", "track.budget.rungs=[48,96]"]
    assert config.resolve_track(str(tmp_path / "base.toml"), settings=both).budget.ladder == (48, 96)


def test_the_base_is_measured_alike_wherever_a_run_ends() -> None:
    short = config.resolve_track("micro", settings=["track.budget.reward_queries=1152"])
    long = config.resolve_track("micro", settings=["track.budget.rungs=[1152,4608]"])
    assert pictures_per_prompt(short, 3) == pictures_per_prompt(long, 3)


# --- tables


def ladder_folder(folder: Path) -> Path:
    """Three rows of three seeds: one that rises to the last rung, one that collapses on the way, one that ends early."""
    for seed in range(3):
        own = {"of": UP, "seed": seed, "queries": 144}
        of = [0.1 + 0.01 * seed, 0.2 + 0.01 * seed, 0.3 + 0.01 * seed]
        boards.leave(
            folder,
            boards.record("dpo", gains=of[2], earlier=of[:2], **own),
            boards.record("kto", gains=None if seed == 1 else 0.4, earlier=[0.25, 0.3] if seed != 1 else [0.25], **own),
            boards.record("sft", gains=-0.05, **own),
        )
    return folder


def test_a_board_compares_at_one_rung(tmp_path: Path) -> None:
    (board,) = leaderboard.boards(ladder_folder(tmp_path))
    assert board.common == 3 and board.ladder == (48, 96, 144)
    seeds = {}
    for rung in (1, 2, 3):
        table = tables.table(board.at(rung)).set_index("algorithm")
        seeds[rung] = table["seeds"].to_dict(), table["failed"].to_dict(), set(table["queries"])
        dpo = [r for r in board.records if r.algorithm == "dpo"]
        gains = np.array([r.at(rung).verdicts[0].gains for r in dpo])
        assert table.loc["dpo", "oracle gain"] == pytest.approx(gains.mean())
        assert set(table["rung"]) == {rung}
    assert seeds[1] == ({"dpo": 3, "kto": 3, "sft": 3}, {"dpo": 0, "kto": 0, "sft": 0}, {48})
    assert seeds[2] == ({"dpo": 3, "kto": 3}, {"dpo": 0, "kto": 1}, {96})
    assert seeds[3][1] == {"dpo": 0, "kto": 1}
    assert tables.table(board).equals(tables.table(board.at(3)))
    assert standings.win_rates(board.at(1)).shape == (3, 3) and standings.win_rates(board).shape == (2, 2)
    assert board.place == "rung 3 of 3, 144 reward queries; 3 runs that end before it not shown"
    assert board.at(1).place == "rung 1 of 3, 48 reward queries"
    for rung in (0, 4):
        with pytest.raises(UsageError, match=f"--rung {rung}: toy-v1 has 3 rungs"):
            board.at(rung)


def test_the_rung_compared_is_where_most_rows_end() -> None:
    def at(*rungs: int) -> int:
        earlier = [(0.1,) * 4, (0.2,) * 4]
        found = [
            boards.record(
                "dpo", of=UP, seed=n, queries=144, gains=(0.3,) * 4, earlier=earlier[: r - 1], options={"beta": n}
            )
            for n, r in enumerate(rungs)
        ]
        return Board(tuple(found)).common

    assert [at(1, 1, 2), at(1, 2), at(1, 3, 3, 2), at(2)] == [1, 2, 3, 2]
    row = [boards.record(of=UP, seed=n, queries=144, gains=(0.2,) * 4, earlier=[(0.1,) * 4] * n) for n in range(3)]
    assert Board(tuple(row)).common == 1, "a row ends where the first of its runs does"


def test_a_row_keeps_its_name_where_its_like_end_earlier() -> None:
    of = {"of": UP, "queries": 144}
    far = boards.record(options={"beta": 1.0}, gains=(0.2,) * 4, earlier=[(0.1,) * 4], **of)
    near = boards.record(options={"beta": 2.0}, gains=(0.1,) * 4, **of)
    board = Board((far, near))
    assert {r.variant for r in leaderboard.rows(board.at(1))} == {"algo.beta=1.0", "algo.beta=2.0"}
    assert [r.variant for r in leaderboard.rows(board.at(2))] == ["algo.beta=1.0"]


def test_every_rung_stands_beside_the_others(tmp_path: Path, said: Any, refused: Any) -> None:
    folder = ladder_folder(tmp_path)
    (board,) = leaderboard.boards(folder)
    lines = tables.by_rung(board).set_index("algorithm")
    assert list(lines.index) == ["dpo", "kto", "sft"], "as the table, then what ends before it"
    assert lines.loc["dpo", "3 rank"] == "1" and lines.loc["sft", "3 rank"] == ""
    assert lines.loc["kto", "2 gain"] == lines.loc["kto", "3 gain"] == -np.inf and np.isnan(lines.loc["sft", "2 gain"])
    for n in (1, 2, 3):
        whole = tables.table(board.at(n)).set_index("algorithm")
        assert lines.loc["dpo", f"{n} low"] == whole.loc["dpo", "oracle low"]
    _, shown, _ = said("leaderboard", folder)
    assert "rung 3 of 3, 144 reward queries; 3 runs that end before it not shown" in shown
    assert "oracle gain at each rung, by its reward queries" in shown and "−∞" in shown
    _, markdown, _ = said("leaderboard", folder, "--markdown", "--rung", 1)
    (line,) = [x for x in markdown.splitlines() if x.startswith("| sft | dfusion | clip | ")]
    assert line.endswith("| – | – | – | – |"), line
    assert markdown.startswith("At rung 1 of 3, 48 reward queries:\n")
    _, csv, _ = said("leaderboard", folder, "--csv", "--rung", 1)
    assert csv.splitlines()[0].split(",")[8] == "rung" and len(csv.splitlines()) == 4
    assert "--rung 4: toy-v1 has 3 rungs" in refused("leaderboard", folder, "--rung", 4)
    plain = boards.leave(tmp_path / "plain", boards.record())
    assert "--rung 2: toy-v1 has no rungs" in refused("leaderboard", plain, "--rung", 2)
    _, csv, _ = said("leaderboard", plain, "--csv")
    assert "rung" not in csv.splitlines()[0].split(",") and not leaderboard.Board((boards.record(),)).place


# --- sweeps and the command


def test_a_sweep_runs_to_its_rung(tmp_path: Path) -> None:
    def planned(rung: int) -> job.Job:
        names = (["diffusion-dpo"], ["vanilla"], ["oracle"])
        ((job,), _) = queue.plan("micro", *names, 1, tmp_path, ["--track", "micro"], rung, settings=OWN)
        return job

    with pytest.raises(UsageError, match="--rung 4: micro-custom-v1 has 3 rungs"):
        planned(4)
    first, second = planned(1), planned(2)
    assert second.words == [*first.words, "--rung", "2"], "the words of a sweep to the first are as they were"
    of = boards.record(of=UP, gains=(0.2,) * 4, earlier=[(0.1,) * 4], queries=144)
    for record, states in (
        (of.at(1), ("finished", "waiting")),
        (of, ("finished", "finished")),
        (boards.record(of=UP, gains=None, earlier=[(0.1,) * 4], rounds=1), ("finished", "miss")),
    ):
        records.write(first.record, record)
        jobs = planned(1), planned(2)
        queue.register(jobs)
        assert tuple(j.state for j in jobs) == states
        gains = [j.result.verdicts[0].gain.mean for j in jobs if j.state == "finished"]
        assert gains == pytest.approx([0.1, 0.2][: len(gains)])


def test_a_run_says_how_to_go_on(tmp_path: Path) -> None:
    record = boards.record(of=UP, gains=(0.2,) * 4, earlier=[(0.1,) * 4], queries=144)
    for each, text in ((record, "rung 2 of 3: --rung 3 goes on to 144 reward queries"), (boards.record(), "")):
        out = Console(width=120, file=io.StringIO())
        display.record(each, tmp_path, out)
        assert text in out.file.getvalue() and ("--rung" in out.file.getvalue()) == bool(text)


def test_the_page_draws_gain_against_queries(tmp_path: Path) -> None:
    (board,) = leaderboard.boards(ladder_folder(tmp_path))
    of_page = content.of_board(board, content.Pictures())
    assert of_page["counts"]["runs"] == 9 and of_page["counts"]["rows"] == 2
    rows = {row["name"][0]: row for row in of_page["data"]["rows"]}
    assert [p[0] for p in rows["dpo"]["climb"]] == [48, 96, 144]
    low, high = (tables.by_rung(board).set_index("algorithm").loc["dpo", f"2 {end}"] for end in ("low", "high"))
    assert rows["dpo"]["climb"][1][2:] == [pytest.approx(low, rel=1e-5), pytest.approx(high, rel=1e-5)]
    assert rows["kto"]["climb"][1:] == [[96, None, None, None], [144, None, None, None]]
    lines = {line["algorithm"]: line["cells"] for line in of_page["rungs"]}
    assert lines["sft"][0][0].startswith("−0.0") and lines["sft"][1:] == [("–", "", "")] * 2
    (early,) = of_page["data"]["early"]
    assert early["name"] == ["sft", "dfusion", "clip"] and [p[0] for p in early["climb"]] == [48]
    assert list(of_page["marks"]) == ["dfusion"]
    page = report.html([board])
    assert 'data-chart="climb"' in page and "rung 3 of 3, 144 reward queries" in page and "144 queries</th>" in page
    assert 'data-chart="climb"' not in report.html([Board((boards.record(),))])
    report.leaderboard_picture(board.at(1), tmp_path / "a.svg")
    assert "rung 1 of 3, 48 reward queries" in (tmp_path / "a.svg").read_text()


# --- merging and publishing


def in_three() -> list[Record]:
    """The record of one run at each of three rungs."""
    return boards.record(of=UP, gains=(0.3,) * 4, earlier=[(0.1,) * 4, (0.2,) * 4], queries=144).stages


def test_records_of_different_rungs_are_compared_at_the_lower_one() -> None:
    first, second, third = in_three()
    for a, b in ((first, second), (second, first), (first, third), (third, third)):
        assert records.differences(a, b) == []
    assert records.further(first, third) and not records.further(third, first) and not records.further(first, first)
    other = boards.record(of=UP, gains=(0.3,) * 4, earlier=[(0.15,) * 4, (0.2,) * 4], queries=144)
    assert records.differences(first, other)[0] == "verdicts.0.trained is 0.6 there and 0.65 here"
    assert any(d.startswith("rungs.0.verdicts.0.trained is 0.6 there") for d in records.differences(third, other))
    failed = boards.record(of=UP, gains=None, earlier=[(0.1,) * 4], rounds=1, queries=48)
    assert records.differences(boards.changed(first, "trained", None), boards.changed(failed, "trained", None)) == []
    assert records.further(first, failed)
    assert records.differences(second, failed)[0].startswith("status is 'finished' there and 'failed' here")
    assert records.differences(boards.changed(first, "cost.base_queries", 3), third) == [], "a field that one has not"


def test_a_merge_takes_the_record_that_goes_further(tmp_path: Path) -> None:
    loras = [b"one", b"two", b"three"]
    hashes = [hashlib.sha256(data).hexdigest() for data in loras]
    whole = in_three()[-1].model_dump(mode="json")
    whole["provenance"]["lora_sha256"] = hashes[2]
    for earlier, digest in zip(whole["rungs"], hashes, strict=False):
        earlier["lora_sha256"] = digest
    stages = Record.model_validate(whole).stages
    for n, stage in enumerate(stages):
        boards.leave(tmp_path / str(n), stage)
        boards.place(tmp_path / str(n), stage).with_name(lora.FILE).write_bytes(loras[n])
    into = tmp_path / "into"
    place = boards.place(into, stages[0])

    def there() -> tuple[int, bytes]:
        ((path, record),) = records.find(into)
        assert path == place
        return record.rung, path.with_name(lora.FILE).read_bytes()

    assert merge.merge([tmp_path / "0"], into).written and there() == (1, b"one")
    done = merge.merge([tmp_path / "1", tmp_path / "0"], into)
    assert (len(done.added), len(done.present), done.written) == (1, 1, True) and there() == (2, b"two")
    assert not merge.merge([tmp_path / "0"], into).written and there() == (2, b"two")
    other = merge.merge([tmp_path / "0", tmp_path / "2", tmp_path / "1"], tmp_path / "at once")
    assert len(other.added) == 1 and len(other.present) == 1
    ((path, record),) = records.find(tmp_path / "at once")
    assert record.rung == 3 and path.with_name(lora.FILE).read_bytes() == b"three"
    boards.place(tmp_path / "2", stages[2]).with_name(lora.FILE).unlink()
    assert merge.merge([tmp_path / "2"], into).written and not place.with_name(lora.FILE).exists(), "of an earlier rung"
    bent = boards.record(of=UP, gains=(0.3,) * 4, earlier=[(0.15,) * 4, (0.2,) * 4], queries=144)
    ((_, why),) = merge.merge([boards.leave(tmp_path / "bent", bent)], into).refused
    assert "another result of the same cell is" in why


def test_a_publication_has_a_line_for_each_rung(tmp_path: Path) -> None:
    (board,) = leaderboard.boards(ladder_folder(tmp_path))
    tables = dataset.tables(dataset.content_of([board]))
    lines = tables["leaderboard"].to_pylist()
    found = [(line["algorithm"], line["rung"], line["seeds"]) for line in lines if line["algorithm"] != "dpo"]
    assert found == [("kto", 1, 3), ("sft", 1, 3), ("kto", 2, 3), ("kto", 3, 3)]
    assert [line["gain"] for line in lines if line["algorithm"] == "kto"][1:] == [-np.inf] * 2
    scores = [s for s in tables["scores"].to_pylist() if (s["algorithm"], s["seed"]) == ("dpo", 0)]
    whole = [(s["rung"], s["gain"]) for s in scores if s["ranks"] and s["n"] == 4]
    assert [rung for rung, _ in whole] == [1, 2, 3]
    assert [gain for _, gain in whole] == pytest.approx([0.1, 0.2, 0.3], abs=0.05)
    curves = tables["curves"].to_pylist()
    assert len({(c["cell_hash"], c["round"], c["metric"]) for c in curves}) == len(curves), "each round once"
    stored = [Record.model_validate_json(r["record"]) for r in tables["records"].to_pylist()]
    assert {(r.algorithm, r.rung) for r in stored} == {("dpo", 3), ("kto", 3), ("kto", 2), ("sft", 1)}
    assert len(stored) == 9
    plain = dataset.tables(dataset.content_of([Board((boards.record(),))]))
    assert plain["leaderboard"].column("rung").to_pylist() == [None]


def test_a_publication_takes_the_record_that_goes_further() -> None:
    first, second, third = ({r.cell_hash: r} for r in in_three())
    (key,) = first
    published = dataset.Content(second, {}, {key[:16]: "samples/old"})
    assert dataset.merged(published, dataset.Content(first)) == published
    merged = dataset.merged(published, dataset.Content(third))
    assert merged.records == third and not merged.samples, "the pictures were of the earlier rung"


# --- the average of the weights


def test_an_average_counts_updates() -> None:
    policy = fake_policy()
    name, weight = next(iter(policy.parameters.items()))
    weight.data.zero_()
    average = WarmedUpEMA(0.3)
    average.weights(policy)
    seen = []
    for value in (1.0, 3.0, 5.0):
        weight.data.fill_(value)
        average.steps += 1
        average.update(policy)
        seen.append(float(average.weights(policy)[name].flatten()[0]))
    # decays 2/11, 3/12 and min(4/13, .3)
    first = 9 / 11
    second = first / 4 + 3 * 3 / 4
    assert seen == pytest.approx([first, second, 0.3 * second + 0.7 * 5])
    with pytest.raises(ZeroDivisionError), policy.holding(average.weights(policy)):
        assert weight.flatten().tolist() == pytest.approx([seen[-1]] * weight.numel())
        raise ZeroDivisionError
    assert weight.flatten().tolist() == [5] * weight.numel()


def test_an_average_is_judged_and_saved_and_training_goes_on_without_it(runs: dict[str, Any], tmp_path: Path) -> None:
    pieces, whole = tmp_path / "pieces", tmp_path / "whole"
    first = run(pieces, 1, "algo.ema=0.9")
    tensors, _ = files.load_tensors(folder_of(pieces) / trainer.CHECKPOINT)
    saved = safetensors.torch.load_file(folder_of(pieces) / lora.FILE)
    average = {k.removeprefix("ema.average."): v for k, v in tensors.items() if k.startswith("ema.average.")}
    weights = {k.removeprefix("lora."): v for k, v in tensors.items() if k.startswith("lora.")}
    assert average.keys() == weights.keys() and len(average) == len(saved)
    assert sorted(v.double().sum().item() for v in saved.values()) == sorted(
        v.double().sum().item() for v in average.values()
    )
    assert any((average[k] != weights[k]).any() for k in average)
    # what is trained, and drawn in training, is as without it; what is judged is not
    assert [r.reward for r in first.rounds] == [r.reward for r in runs["first"].rounds]
    assert first.cell_hash != runs["first"].cell_hash and "ema" not in runs["first"].resolved["algorithm"]
    assert first.provenance.lora_sha256 != runs["first"].provenance.lora_sha256
    again, once = run(pieces, 2, "algo.ema=0.9"), run(whole, 2, "algo.ema=0.9")
    assert again.provenance.lora_sha256 == once.provenance.lora_sha256
    assert "exponential average over the updates, of decay 0.9" in (folder_of(whole) / "README.md").read_text()
