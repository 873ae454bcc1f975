"""Records: the published schema, what reading refuses, migrations, and what a record's own numbers contradict."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from boards import HELDOUT, changed, digest, record, track

from bench_dfusion.errors import UsageError
from bench_dfusion.results import records

LEADERBOARDS = Path(__file__).parent.parent / "leaderboards"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # runpy: the module is imported already
def test_the_published_schema_is_what_the_command_writes(capsys) -> None:
    runpy.run_module("bench_dfusion.results.records", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out == (LEADERBOARDS / "record.schema.json").read_text(), (
        "python -m bench_dfusion.results.records > leaderboards/record.schema.json"
    )


LATER = {"trained": True, "untrained": "no update", "agreement": {"clip": 0.5}, "submitter": "somebody"}
LATER_OF = {
    "provenance": {"scores_sha256": digest("s"), "base_sha256": digest("b"), "prompts_seen": {"train": digest("t")}},
    "rounds.0": {"base_on_prompts": 0.25, "rise": 0.125},
}


def test_published_records_fit_the_schemas_and_do_not_contradict_themselves() -> None:
    """Their files are of version 1, as their runs wrote them; migrated they fit this one, and nothing is lost."""
    schemas = {1: "record-v1.schema.json", 2: "record.schema.json"}
    validators = {}
    for version, name in schemas.items():
        schema = json.loads((LEADERBOARDS / name).read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        validators[version] = jsonschema.Draft202012Validator(schema)
    found = records.find(LEADERBOARDS)
    assert len(found) == 230
    for path, published in found:
        content, migrated = json.loads(path.read_bytes()), published.model_dump(mode="json")
        validators[content["schema_version"]].validate(content)
        validators[2].validate(migrated)
        assert {k: v for k, v in migrated.items() if k != "schema_revision"} == {**content, "schema_version": 2}
        assert published.trained is None and published.agreement is None and published.submitter == ""
        assert published.provenance.prompts_seen is None and published.rounds[0].rise is None
        assert records.check(published) == [], path

    validator = validators[2]
    content = with_later_fields(record()).model_dump(mode="json")
    validator.validate(content)
    for key, value in {"more": 1, "schema_version": 1, "seed": "none", "verdicts": [{}]}.items():
        assert not validator.is_valid({**content, key: value}), key
    del content["schema_version"]
    assert not validator.is_valid(content)


def with_later_fields(original: records.Record) -> records.Record:
    """With everything that a record of version 1 has not."""
    content = original.model_dump(mode="json") | LATER
    content["provenance"] |= LATER_OF["provenance"]
    content["rounds"][0] |= LATER_OF["rounds.0"]
    return records.Record.model_validate(content)


def test_a_later_field_is_written_where_it_is_known_and_makes_no_other_result(tmp_path: Path) -> None:
    early, late = (of(record(agreement=None)) for of in (lambda r: r, with_later_fields))
    for each in (early, late):
        records.write(tmp_path / "record.json", each)
        assert records.read(tmp_path / "record.json") == each
    written, more = early.model_dump(mode="json"), late.model_dump(mode="json")
    assert not written.keys() & LATER.keys() and more.keys() - written.keys() == LATER.keys()
    assert more["provenance"].keys() - written["provenance"].keys() == LATER_OF["provenance"].keys()
    assert records.differences(early, late) == records.differences(late, early) == []
    other = changed(late, "agreement", {"clip": 0.75})
    assert records.differences(late, other) == ["agreement.clip is 0.5 there and 0.75 here"]
    assert records.differences(late, changed(late, "submitter", "another")) == []


def test_whether_anything_was_trained() -> None:
    rounds = record().rounds
    assert records.training(rounds, 4) == (True, None), "a record without gradient norms says nothing against it"
    assert records.training(rounds, 0)[0] is False and "no update" in str(records.training([], 0)[1])
    norms = [[0.0, 0.0], [0.0, 1e-9]]
    of = [[r.model_copy(update={"metrics": {"grad_norm": n}}) for r, n in zip(rounds, m, strict=True)] for m in norms]
    assert records.training(of[0], 4) == (False, "no gradient arrived: its norm was 0 in every round")
    assert records.training(of[1], 4) == (True, None)


def test_the_prompt_lists_are_hashed_each_in_its_order() -> None:
    seen = records.prompts_seen(track())
    assert list(seen) == ["train", "heldout"], "a list without prompts was not seen"
    turned = records.prompts_seen(track(heldout=dict(reversed(HELDOUT.items()))))
    assert turned["train"] == seen["train"] and turned["heldout"] != seen["heldout"]


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {k: v for k, v in content.items() if k != key}


def having(key: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {**content, key: value}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without("schema_version"), "no schema_version: no record of bench-dfusion, or older than its first schema"),
        (having("schema_version", 0), "schema 0, older than 2, and this bench-dfusion has no migration from it"),
        (having("schema_version", 3), "schema 3, this bench-dfusion reads 2: update bench-dfusion"),
        (
            lambda content: {**content, "schema_revision": records.REVISION + 1, "kinder": 1},
            f"kinder: a field of revision {records.REVISION + 1}, this bench-dfusion reads 2.{records.REVISION}: update",
        ),
        (having("schema_version", "1"), 'schema_version must be a whole number, not "1"'),
        (having("schema_version", True), "schema_version must be a whole number, not true"),
        (having("evidnce", "x"), "evidnce: no field of this schema"),
        (having("\x1b[31mred\n", "x"), "\\x1b[31mred\\n: no field of this schema"),
        (having("seed", "zero"), "is no record of schema 2: seed: Input should be a valid integer"),
        (having("resolved", {"algorithm": {}, "reward": {}}), "resolved has no options of the builder"),
        (lambda content: [content], "no schema_version"),
    ],
)
def test_what_is_no_record_of_this_schema_is_one_line(change, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(change(record().model_dump(mode="json"))))
    with pytest.raises(UsageError) as refused:
        records.read(path)
    message = str(refused.value)
    assert message.startswith(str(path)) and expected in message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"seed": 0', '"seed": NaN'),
        ('"sample": 1.5', '"sample": Infinity'),
        ('"sample": 1.5', '"sample": 1e999'),
        ('"given": {', '"given": {"beta": -Infinity, '),  # where any JSON may stand
        ('"given": {', '"given": {"beta": "\\ud800", '),  # half a character cannot be written again
        ('"given": {', '"given": ' + "[" * 200_000),
        ('"given": {', "given: {"),
        ("}", ""),
    ],
)
def test_what_is_no_json_or_not_finite_is_one_line(old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    text = json.dumps(record().model_dump(mode="json"))
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UsageError, match=r"record\.json is no record, or only a part of one: .+") as refused:
        records.read(path)
    assert str(refused.value).isprintable()


def test_half_a_record_and_no_record_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    records.write(path, record())
    data = path.read_bytes()
    for cut in (0, 1, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:cut])
        with pytest.raises(UsageError, match="only a part of one"):
            records.read(path)
    path.write_bytes(b"\xff\xfe\x00" + data)
    with pytest.raises(UsageError, match="only a part of one"):
        records.read(path)
    with pytest.raises(UsageError, match="No such file"):
        records.read(tmp_path / "none.json")


def test_what_is_written_reads_as_it_was(tmp_path: Path) -> None:
    for original in (record(), record(gains=None)):
        records.write(tmp_path / "record.json", original)
        assert records.read(tmp_path / "record.json") == original


def test_older_records_are_migrated_version_by_version(tmp_path: Path, monkeypatch) -> None:
    expected = record().model_copy(update={"schema_revision": 0})
    old = without("cost")(expected.model_dump(mode="json")) | {"schema_version": -1, "spent": {}}
    cost = expected.cost.model_dump(mode="json")
    monkeypatch.setitem(records.MIGRATIONS, -1, lambda c: {**without("spent")(c), "bill": {**c["spent"], **cost}})
    monkeypatch.setitem(records.MIGRATIONS, 0, lambda c: {**without("bill")(c), "cost": c["bill"]})
    path = tmp_path / "record.json"
    path.write_text(json.dumps(old))
    assert records.read(path) == expected
    path.write_text(json.dumps(without("spent")(old)))
    with pytest.raises(UsageError, match=r"damaged: no migration from schema -1 \(KeyError: 'spent'\)"):
        records.read(path)


def test_sound_records_have_no_problem() -> None:
    for sound in (
        record(),
        record(reward="oracle"),
        record(gains=None),
        record(gains=None, queries=0, rounds=0),
        record(queries=0, builder="offline"),
        record(of=track(batch=7)),
    ):
        assert records.check(sound) == []


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("track", "toy-v2", "track 'toy-v2', but the resolved track is 'toy-v1'"),
        ("track_hash", digest("other"), "track_hash is not the hash of the resolved track"),
        ("cell_hash", digest("other"), "cell_hash is not the hash of the resolved configuration"),
        ("resolved.algorithm.beta", 3, "cell_hash is not the hash"),
        ("resolved.track.sampler.steps", 5, "track_hash is not the hash"),
        ("resolved.track", {"name": "toy"}, "resolved.track is no track"),
        ("resolved.track.prompts.train", ["A red  ring."], "share 'A red  ring.' and 'a red ring', two spellings"),
        ("algorithm", "kto", "algorithm 'kto', but the resolved algorithm is 'dpo'"),
        ("builder", "vanilla", "builder 'vanilla', but the resolved builder is 'dfusion'"),
        ("reward", "oracle", "reward 'oracle', but the resolved reward is 'clip'"),
        ("seed", 1, "seed 1, but the resolved seed is 0"),
        ("provenance.model_sha256", digest("other"), "not the hash of the track's model"),
        ("cost.reward_queries", 97, "more than the budget of 96"),
        ("cost.reward_queries", 95, "rounds count more reward queries"),
        ("cost.updates", -1, "cost.updates is negative"),
        ("cost.seconds.train", -0.5, "cost.seconds.train is negative"),
        ("rounds.0.queries", 97, "rounds count more reward queries"),
        ("rounds.1.queries", 95, "but the last round ends at 95"),
        ("rounds.1.round", 2, "rounds are not numbered from 0 on"),
        ("status", "failed", "status failed, but judges gave verdicts"),
        ("verdicts", [], "verdicts of [], but the track's judges are ['oracle', 'clip']"),
        ("verdicts.1.judge", "oracle", "verdicts of ['oracle', 'oracle']"),
        ("verdicts.0.per_prompt", [(0.5, 0.75)] * 3, "verdict of oracle: 3 prompts, but the track holds out 4"),
        ("verdicts.0.per_prompt.2.1", 0.9, "verdict of oracle: gain.mean is 0.25, but per_prompt gives 0.275"),
        ("verdicts.0.base", 0.5001, "verdict of oracle: base is 0.5001, but per_prompt gives 0.5"),
        ("verdicts.1.trained", 0.9, "verdict of clip: trained is 0.9, but per_prompt gives 0.625"),
        ("verdicts.0.gain.mean", 0.2501, "verdict of oracle: gain.mean is 0.2501, but per_prompt gives 0.25"),
        ("verdicts.0.gain.low", 0.5, "verdict of oracle: gain.low is above gain.high"),
        ("verdicts.0.templates.count", (0.5, 0.9), "templates.count trained is 0.9, but per_prompt gives 0.85"),
        ("verdicts.0.templates", {"count": (0.5, 0.85)}, "templates ['count'], but the track's are"),
        ("verdicts.1.trained_on", False, "verdict of clip: it is the training reward"),
    ],
)
def test_a_record_that_contradicts_itself_is_found(path: str, value: Any, expected: str) -> None:
    problems = records.check(changed(record(), path, value))
    assert any(expected in p for p in problems), problems


def test_means_may_differ_by_float32_rounding_at_any_scale() -> None:
    for scale in (1e-3, 1.0, 1e3):
        content = record().model_dump(mode="json")
        verdict = content["verdicts"][0]
        for key in ("base", "trained"):
            verdict[key] *= scale
        verdict["gain"] = {k: v * scale if k != "kind" else v for k, v in verdict["gain"].items()}
        verdict["templates"] = {t: [v * scale for v in pair] for t, pair in verdict["templates"].items()}
        verdict["per_prompt"] = [[v * scale for v in pair] for pair in verdict["per_prompt"]]
        scaled = records.Record.model_validate(content)
        assert records.check(changed(scaled, "verdicts.0.trained", 0.75 * scale * (1 + 1e-6))) == []
        assert len(records.check(changed(scaled, "verdicts.0.trained", 0.75 * scale * (1 + 1e-4)))) == 1


def test_every_difference_of_two_results_is_named_and_none_of_how_they_were_run() -> None:
    one = record()
    for path, value, expected in (
        ("verdicts.1.per_prompt.2.0", 7.0, ["verdicts.1.per_prompt.2.0 is 0.5 there and 7.0 here"]),
        ("rounds", [], ["rounds is a list of 2 there and a list of 0 here"]),
        ("rounds.0.metrics", {"kl": 1.0}, ["loss is 0.5 there and None here", "kl is None there and 1.0 here"]),
        ("resolved.track.batch", 7, ["resolved.track.batch is 64 there and 7 here"]),
        ("drift", None, ["there and None here"]),
        ("given", {"algo": "a"}, []),
        ("tuning", "none", []),
        ("cell_hash", digest("batch"), []),
        ("cost.seconds", {}, []),
        ("provenance.versions", {}, []),
        ("provenance.plugins", {}, []),
    ):
        found = records.differences(one, changed(one, path, value))
        assert len(found) == len(expected) and all(map(str.endswith, found, expected)), (path, found)
        assert all(len(f) < 140 for f in found)
