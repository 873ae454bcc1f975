"""What cannot stand in a table: real records, doctored; each is refused in one line by every command that makes a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from boards import leave, place

from bench_dfusion import registry
from bench_dfusion.errors import UsageError
from bench_dfusion.publish import repository
from bench_dfusion.results import checks, leaderboard, merge, records, tables
from bench_dfusion.results.leaderboard import Board
from bench_dfusion.results.records import Record
from bench_dfusion.tracks import schema
from bench_dfusion.tracks.schema import content_sha256

LEADERBOARDS = Path(__file__).parent.parent / "leaderboards"
Content = dict[str, Any]
Doctor = Callable[[Content], None]


@cache
def real(name: str = "diffusion-dpo-vanilla-clip") -> tuple[Record, ...]:
    """The five records of a published row, by seed."""
    return tuple(records.read(p) for p in sorted((LEADERBOARDS / "micro-v1").glob(f"{name}-s*/record.json")))


@pytest.fixture(scope="module")
def checker() -> checks.Checker:
    return checks.Checker()


def doctored(original: Record, doctor: Doctor) -> Record:
    """A record after a careful forger: means, hashes of options and of the track are made to fit."""
    content = original.model_dump(mode="json")
    doctor(content)
    resolved = content["resolved"]
    content["track_hash"] = content_sha256({k: v for k, v in resolved["track"].items() if k != "batch"})
    content["cell_hash"] = content_sha256(resolved)
    prompts = resolved["track"]["prompts"]
    names = [(prompts["templates"] or {}).get(p, "all") for p in prompts["heldout"]]
    for verdict in content["verdicts"]:
        pairs = np.array(verdict["per_prompt"], dtype=float)
        if len(pairs) != len(names) or not np.isfinite(pairs).all():
            continue
        verdict["base"], verdict["trained"] = pairs.mean(0).tolist()
        moved = float((pairs[:, 1] - pairs[:, 0]).mean()) - verdict["gain"]["mean"]
        verdict["gain"] |= {key: verdict["gain"][key] + moved for key in ("mean", "low", "high")}
        verdict["templates"] = {t: pairs[[n == t for n in names]].mean(0).tolist() for t in dict.fromkeys(names)}
    return Record.model_validate(content)


def setting(path: str, value: Any) -> Doctor:
    def change(content: Content) -> None:
        *parents, last = path.split(".")
        inner: Any = content
        for key in parents:
            inner = inner[int(key) if isinstance(inner, list) else key]
        inner[int(last) if isinstance(inner, list) else last] = value

    return change


def moving(judges: tuple[int, ...], which: int, change: Callable[[np.ndarray], np.ndarray]) -> Doctor:
    """Change the scores of the base (0) or the trained policy (1) before some judges, as float32 like real ones."""

    def move(content: Content) -> None:
        for judge in judges:
            pairs = np.array(content["verdicts"][judge]["per_prompt"])
            pairs[:, which] = change(pairs[:, which])
            content["verdicts"][judge]["per_prompt"] = pairs.astype(np.float32).astype(float).tolist()

    return move


def both(*doctors: Doctor) -> Doctor:
    def change(content: Content) -> None:
        for doctor in doctors:
            doctor(content)

    return change


def relabelled(content: Content) -> None:
    """A run trained on the oracle as one trained on the CLIP."""
    clip = next(r for r in real() if r.seed == content["seed"])
    content["reward"] = content["given"]["reward"] = "clip"
    content["resolved"]["reward"] = clip.resolved["reward"]
    content["provenance"]["reward_fingerprint"] = clip.provenance.reward_fingerprint
    for verdict in content["verdicts"]:
        verdict["trained_on"] = verdict["judge"] == "clip"


def one_judge_of_it(content: Content) -> None:
    relabelled(content)
    for r in content["rounds"]:
        r["reward"], r["reward_sd"] = r["reward"] + 0.12, r["reward_sd"] - 0.005


def fewer_rounds(content: Content) -> None:
    content["rounds"] = content["rounds"][:6]
    content["cost"]["reward_queries"] = content["rounds"][-1]["queries"]


def no_queries(content: Content) -> None:
    content["cost"]["reward_queries"] = 0
    for r in content["rounds"]:
        r["queries"] = 0


def cheap(content: Content) -> None:
    content["cost"]["reward_queries"] = 48
    for n, r in enumerate(content["rounds"]):
        r["queries"] = 4 * (n + 1)


ORACLE = "diffusion-dpo-vanilla-oracle"
BENT: dict[str, tuple[Doctor, str]] = {
    "trained raised": (moving((0, 1, 2), 1, lambda x: x + 0.2), "outside the judge's range, 0 to 1"),
    "trained raised and cut at 1": (moving((0, 1, 2), 1, lambda x: np.minimum(1, x + 0.2)), "no share of 4 pictures"),
    "graded raised": (moving((0,), 1, lambda x: np.minimum(1, x + 0.2)), "does not go with full"),
    "graded raised a little": (moving((0,), 1, lambda x: np.minimum(1, x * 1.02)), "does not go with full"),
    "full raised": (moving((1,), 1, lambda x: np.minimum(1, x + 0.25)), "does not go with full"),
    "not float32": (setting("verdicts.2.per_prompt.3.1", 0.8), "0.8 is no float32"),
    "score of 5": (setting("verdicts.0.per_prompt.3.1", 5.0), "verdict of oracle: per_prompt: 5 is outside"),
    "score of 1e300": (setting("verdicts.0.per_prompt.3.1", 1e300), "is larger than anything measured"),
    "cosine below -1": (setting("verdicts.2.per_prompt.3.1", -1.5), "verdict of clip: per_prompt: -1.5 is outside"),
    "negative zero": (setting("verdicts.1.per_prompt.40.0", -0.0), "verdicts.1.per_prompt.40.0: negative zero"),
    "interval of 1e300": (setting("verdicts.0.gain.high", 1e300), "verdicts.0.gain.high: 1e+300"),
    "interval wider than its prompts": (setting("verdicts.0.gain.high", 3.0), "verdict of oracle: gain"),
    "base lowered": (moving((0, 1, 2), 0, lambda x: np.maximum(0, x - 0.25)), "verdict of oracle: base"),
    "base lowered a little": (moving((2,), 0, lambda x: x - 0.01), "verdict of clip: base"),
    "diversity of another base": (setting("drift.diversity_base", 1.9), "drift.diversity_base"),
    "another judge": (setting("verdicts.0.fingerprint", "0" * 64), "verdict of oracle: fingerprint"),
    "48 queries": (cheap, "rounds.0.queries: 4, but 1 rounds of diffusion-dpo with vanilla cost 384"),
    "no query": (no_queries, "rounds.0.queries: 0, but"),
    "half the rounds": (fewer_rounds, "rounds: 6, but the budget has 12 of 384 queries"),
    "1 evaluation": (setting("cost.network_evaluations", 1), "cost.network_evaluations: 1, but"),
    "no update": (setting("cost.updates", 0), "cost.updates: 0, but 12 rounds that trained make 12 to 24"),
    "many updates": (setting("cost.updates", 240), "cost.updates: 240, but"),
    "no time": (setting("cost.seconds", {}), "cost.seconds: a run takes time"),
    "1e300 seconds": (setting("cost.seconds.train", 1e300), "cost.seconds.train: 1e+300"),
    "10^400 updates": (setting("cost.updates", 10**400), "cost.updates: a number is larger"),
    "negative drift": (setting("drift.kl", -0.5), "drift.kl: -0.5 is outside 0 to ∞"),
    "drift of 300 levels": (setting("drift.pixels", 300.0), "drift.pixels: 300 is outside 0 to 255"),
    "no drift": (setting("drift", None), "drift: missing"),
    "no difference": (setting("drift.pixels", 0.0), "drift.pixels: 0, but"),
    "diversity of 9": (setting("drift.diversity_trained", 9.0), "drift.diversity_trained: 9 is outside 1 to 4"),
    "round's reward": (setting("rounds.5.reward", 7.0), "rounds.5: rewards: 7 is outside"),
    "round's spread": (setting("rounds.5.reward_sd", -0.1), "rounds.5.reward_sd"),
    "round's pairs": (setting("rounds.5.pairs", 500), "rounds.5.pairs: 500 and"),
    "round without a reward": (setting("rounds.5.reward", None), "1 rounds have no reward"),
    "first round": (setting("rounds.0.reward", 0.75), "rounds.0.reward: 0.75, but the base draws 0.708686"),
    "learning rate of -5": (setting("resolved.algorithm.learning_rate", -5.0), "resolved.algorithm.learning_rate"),
    "learning rate in words": (
        setting("resolved.algorithm.learning_rate", "0.004"),
        "resolved.algorithm.learning_rate",
    ),
    "an option it has not": (setting("resolved.algorithm.luck", 1.0), "unknown option algorithm 'luck'"),
    "a builder's option": (setting("resolved.builder.margin", -1.0), "resolved.builder.margin"),
    "a reward's option": (setting("resolved.reward.batch", 0), "resolved.reward.batch"),
    "another seed": (both(setting("seed", 1), setting("resolved.seed", 1)), "rounds.0.reward"),
    "another track of its name": (setting("resolved.track.sampler.steps", 7), "is not the micro-v1 of bench-dfusion"),
    "fewer held-out prompts judged": (setting("resolved.track.evaluation.images_per_prompt", 8), "track_hash"),
    "no LoRA": (setting("provenance.lora_sha256", "none"), "provenance.lora_sha256"),
    "agreement of 2": (setting("agreement", {"oracle": 2.0}), "agreement.oracle: 2 is no rank correlation"),
    "trained and not": (setting("untrained", "it was not"), "untrained"),
    "a rise of its own": (setting("rounds.2.rise", 0.5), "rounds.2.rise"),
    "other prompts": (setting("provenance.prompts_seen", {"train": "0" * 64}), "provenance.prompts_seen.train"),
}


@pytest.mark.parametrize("case", BENT)
def test_a_doctored_record_is_refused_in_one_line(case: str, checker: checks.Checker) -> None:
    doctor, expected = BENT[case]
    with pytest.raises(UsageError) as refused:
        checker.refuse(doctored(real()[0], doctor))
    assert expected in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.parametrize("doctor", [relabelled, one_judge_of_it])
def test_a_doctored_record_of_another_reward_is_refused(doctor: Doctor, checker: checks.Checker) -> None:
    for original in real(ORACLE):
        with pytest.raises(UsageError, match=r"rounds\.0\.reward: .* another reward or another seed trained it"):
            checker.refuse(doctored(original, doctor))
    hidden = doctored(real(ORACLE)[0], setting("verdicts.1.trained_on", False))
    with pytest.raises(UsageError, match="verdict of oracle:full: trained_on: False, but the reward was oracle"):
        checker.refuse(hidden)
    other = doctored(real()[0], setting("provenance.reward_fingerprint", "0" * 64))
    with pytest.raises(UsageError, match="trained_on|reward_fingerprint"):
        checker.refuse(other)


def test_real_records_pass_and_are_what_is_known_of_their_track(checker: checks.Checker) -> None:
    found = records.find(LEADERBOARDS)
    checks.check(found, checks.Checker())
    assert all(checker.flags(r) == [] and checker.by_rule(r) for _, r in found)
    assert checks.facts([r for _, r in found])["micro-v1"] == checks.KNOWN["micro-v1"]
    text = (Path(checks.tracks.HERE) / "known.json").read_text()
    assert text == checks.dumped(checks.KNOWN)


def test_the_known_hashes_are_those_of_the_shipped_tracks() -> None:
    """A track that changes needs another version; where it does, its hash comes into tracks/known.json."""
    complete = {}
    for name in registry.plugins("tracks"):
        content = schema.read(name)
        if "model" in content and "source" not in content.get("prompts", {"source": ""}):
            settings = schema.Track.model_validate(content)
            complete[settings.id] = settings.hash
    assert complete.items() <= {name: known["hash"] for name, known in checks.KNOWN.items()}.items()
    assert {"micro-v1", "micro-fast-v1"} <= complete.keys()


# Beside each other


def copies(original: Record, change: Doctor = lambda content: None) -> list[Record]:
    """One run under five seeds, its curve made to fit each."""
    found = []
    for other in real():
        curve = [r.model_dump(mode="json") for r in other.rounds]
        seeds = both(setting("seed", other.seed), setting("resolved.seed", other.seed), setting("rounds", curve))
        found.append(doctored(original, both(seeds, change)))
    return found


def test_doctored_copies_of_one_run_are_refused() -> None:
    originals = [(None, r) for r in copies(real()[0])]
    with pytest.raises(UsageError, match=r"seed 1: provenance\.lora_sha256: its LoRA is that of .*seed 0"):
        checks.check(originals)
    relabelled = [
        (None, r.model_copy(update={"provenance": r.provenance.model_copy(update={"lora_sha256": f"{r.seed:064x}"})}))
        for _, r in originals
    ]
    with pytest.raises(UsageError, match=r"seed 1: verdicts\.per_prompt: its trained scores are those of .*seed 0"):
        checks.check(relabelled)
    checks.check(relabelled[:1])


def test_a_doctored_base_is_refused_beside_the_others_of_a_track_that_is_not_known() -> None:
    """Whose base is right, most records decide; the last bit counts where the machine was the same."""

    def renamed(original: Record, doctor: Doctor = lambda content: None) -> Record:
        names = both(setting("track", "other-v1"), setting("resolved.track.name", "other"))
        return doctored(original, both(names, doctor))

    last_bit = moving((2,), 0, lambda x: np.where(np.arange(len(x)) == 3, np.nextafter(x, 2, dtype=np.float32), x))
    odd = renamed(real()[0], last_bit)
    others = [renamed(r) for r in real()[1:]]
    with pytest.raises(UsageError, match=r"seed 0: verdict of clip: per_prompt: its base is not that of .*seed 1"):
        checks.check([(None, odd), *((None, r) for r in others)])
    elsewhere = setting("provenance.hardware", "another processor")
    checks.check([(None, renamed(real()[0], both(last_bit, elsewhere))), *((None, r) for r in others)])
    lowered = renamed(real()[0], both(moving((2,), 0, lambda x: x - 0.01), elsewhere))
    with pytest.raises(UsageError, match="seed 0: verdict of clip: base: .* is not that of"):
        checks.check([(None, lowered), *((None, r) for r in others)])


# What its owner may see and nobody publish


FLAGGED: dict[str, tuple[Doctor, str]] = {
    "dirty": (setting("provenance.dirty", True), "provenance.dirty: the code had changes"),
    "unknown": (setting("provenance.dirty", None), "provenance.dirty"),
    "no revision": (setting("provenance.code", None), "provenance.code: no code revision"),
    "no such revision": (setting("provenance.code", "my laptop"), "provenance.code: 'my laptop' is no code revision"),
    "foreign algorithm": (
        setting("provenance.plugins.algo", "better-dpo 0.1.0"),
        "provenance.plugins.algo: diffusion-dpo is bench-dfusion's own, and this one came from better-dpo 0.1.0",
    ),
    "foreign builder": (setting("provenance.plugins.builder", "mine.py"), "provenance.plugins.builder"),
    "silent": (setting("provenance.plugins", {}), "provenance.plugins.algo"),
    "other arithmetic": (
        moving((2,), 0, lambda x: np.where(np.arange(len(x)) == 3, x + 1e-6, x)),
        "the base was drawn by other arithmetic",
    ),
}


@pytest.mark.parametrize("case", FLAGGED)
def test_a_doctored_or_unpublishable_record_has_a_flag_in_its_own_table_only(
    case: str, checker: checks.Checker
) -> None:
    doctor, expected = FLAGGED[case]
    bad = doctored(real()[0], doctor)
    checker.refuse(bad)
    assert any(expected in flag for flag in checker.flags(bad))
    board = Board((bad, *real()[1:]))
    (line,) = tables.table(board).to_dict("records")
    assert expected in line["flags"] and "(1 of 5 runs)" in line["flags"] and line["rank"] == "1"
    assert "not to be published: diffusion-dpo/vanilla/clip: " in tables.markdown(board)


def test_a_doctored_seed_outside_the_track_is_not_published(checker: checks.Checker) -> None:
    bad = doctored(real()[0], both(setting("seed", 7), setting("resolved.seed", 7)))
    checker.refuse(bad)
    assert checker.flags(bad) == ["seed: 7 is none of the track's seeds, 0 to 4"]


# By every command


@pytest.mark.parametrize("case", ["graded raised", "score of 1e300", "base lowered", "another track of its name"])
def test_every_command_refuses_what_is_bent(case: str, tmp_path: Path, refused, said) -> None:
    doctor, expected = BENT[case]
    bad = doctored(real()[0], doctor)
    theirs = leave(tmp_path / "theirs", bad, *real()[1:])
    for words in (("leaderboard", theirs), ("report", theirs, "--to", tmp_path / "page.html")):
        message = refused(*words)
        assert expected in message and str(place(theirs, bad)) in message and bad.name in message
    boards = [Board(cells) for cells in ((bad,), real()[1:])]
    with pytest.raises(UsageError, match="diffusion-dpo/vanilla/clip/seed 0"):
        repository.to_directory(boards, tmp_path / "published")
    code, out, _ = said("merge", theirs, "--into", tmp_path / "into")
    assert code == 2 and expected in out and str(place(theirs, bad)) in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"], "nothing is written"


def test_every_command_but_the_owners_tables_refuses_doctored_provenance(tmp_path: Path, said) -> None:
    bad = doctored(real()[0], setting("provenance.dirty", True))
    own = leave(tmp_path / "runs", bad, *real()[1:])
    code, out, _ = said("leaderboard", own)
    assert code == 0 and "not to be published: diffusion-dpo/vanilla/clip: provenance.dirty" in out
    with pytest.raises(UsageError, match=r"seed 0 cannot be published: provenance\.dirty"):
        repository.to_directory(leaderboard.boards(own), tmp_path / "published")
    done = merge.merge([own], tmp_path / "into")
    ((path, reason),) = done.refused
    assert path == place(own, bad) and reason.startswith("not to be published: provenance.dirty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_doctored_number_that_is_none_is_refused_when_it_is_read(number: str, tmp_path: Path, refused) -> None:
    own = leave(tmp_path / "runs", *real())
    path = place(own, real()[0])
    content = json.loads(path.read_text())
    first = json.dumps(content["verdicts"][0]["per_prompt"][0][1])
    text = json.dumps(content)
    at = text.index(first, text.index('"per_prompt"'))
    path.write_text(text[:at] + number + text[at + len(first) :])
    assert "is no record, or only a part of one" in refused("leaderboard", own)


# One row each


def variants(count: int) -> list[Record]:
    """A published row and variants of its weight decay, each of which would be ranked first."""
    found = list(real())
    for n in range(count):
        for r in real():
            change = both(
                setting("resolved.algorithm.weight_decay", 0.001 * (n + 1)),
                setting("provenance.lora_sha256", f"{n:032x}{r.seed:032x}"),
            )
            found.append(doctored(r, change))
    return found


def test_doctored_variants_of_a_row_are_not_ranked_and_shown_on_demand() -> None:
    board = Board((*variants(30), *real("dpok-vanilla-clip")))
    frame = tables.table(board)
    assert len(frame) == 32 and sorted(frame["rank"]) == [""] * 30 + sorted(frame["rank"])[-2:]
    own = frame[frame["algorithm"] == "diffusion-dpo"]
    assert (own["note"] == "variant: other options than those the track's tuning chose").sum() == 30
    (ranked,) = own[own["rank"] != ""].to_dict("records")
    assert ranked["variant"] == "algo.weight_decay=0.0001", "the track's own"
    short = tables.table(board, variants=False)
    assert list(short["algorithm"]) == ["diffusion-dpo", "dpok"]
    text = tables.markdown(board)
    assert "variants not shown (--variants): 30 of diffusion-dpo/vanilla/clip" in text
    assert tables.markdown(board, variants=True).count("| variant |") == 30
    assert tables.csv(board).count("\n") == 3 and tables.csv(board, variants=True).count("\n") == 33


def test_the_best_doctored_variant_alone_is_not_ranked_either() -> None:
    (line,) = tables.table(Board(tuple(variants(1)[5:]))).to_dict("records")
    assert line["rank"] == "" and line["note"].startswith("variant: ")


def test_each_submitter_has_a_row() -> None:
    theirs = [doctored(r, both(setting("submitter", "somebody"), setting("resolved.track.batch", 7))) for r in real()]
    with pytest.raises(ValueError, match="has two records"):
        Board((*real(), *theirs))
    others = [doctored(r, setting("submitter", "somebody")) for r in real("dpok-vanilla-clip")]
    frame = tables.table(Board((*real(), *others)))
    assert dict(zip(frame["algorithm"], frame["submitter"], strict=True)) == {"diffusion-dpo": "", "dpok": "somebody"}
    assert "| clip (by somebody) |" in tables.markdown(Board((*real(), *others)))


@pytest.mark.parametrize(("agreement", "note"), [(1.0, "ceiling: its reward agrees with the judge (1.00)"), (0.8, "")])
def test_a_doctored_name_of_the_judge_is_a_ceiling_by_its_measured_agreement(
    agreement: float, note: str, tmp_path: Path
) -> None:
    cells = [r.model_copy(update={"agreement": {"oracle": agreement, "clip": 0.5}}) for r in real()]
    (line,) = tables.table(Board(tuple(cells))).to_dict("records")
    assert line["note"].startswith(note) and bool(line["rank"]) == (not note)
    fingerprint = cells[0].provenance.reward_fingerprint
    leave(tmp_path, *cells)
    (tmp_path / "reviewed.json").write_text(
        json.dumps({fingerprint: "looked at on 2026-11-30: the CLIP it says it is"})
    )
    ((line,),) = [tables.table(b).to_dict("records") for b in leaderboard.boards(tmp_path)]
    assert line["rank"] == "1", "a person has looked"
    (tmp_path / "reviewed.json").write_text("[1]")
    with pytest.raises(UsageError, match=r"reviewed\.json"):
        leaderboard.boards(tmp_path)
