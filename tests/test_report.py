"""The page and the picture: what they say, and in a real browser what a reader can do with them."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from boards import leave, record, register, track
from PIL import Image
from webdriver import HOW, Browser, binaries

from bench_dfusion import report
from bench_dfusion.errors import UsageError
from bench_dfusion.report import content
from bench_dfusion.report.marks import ticks, visible
from bench_dfusion.results import leaderboard, tables
from bench_dfusion.results.records import Record

HOSTILE = (
    "<script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit = 2">',
    "</script><script>window.hit = 3</script>\u2028",
    "\x1b[31m=HYPERLINK('http://127.0.0.1')\u202e",
)
PROMPTS = tuple(text.replace("\x1b", "") for text in HOSTILE)  # a track has no prompt with a control character


def hostile_folder(folder: Path) -> Path:
    """A track of every kind of row, whose prompts, evidence and names try to be markup."""
    of = track(prompts={"train": ["a cyan square"], "heldout": PROMPTS, "templates": {PROMPTS[0]: HOSTILE[1]}})
    every = [
        *runs("dpo", "dfusion", "clip", 0.10, of=of),
        *runs("dpo", "vanilla", "clip", 0.05, of=of),
        *runs("dpo", "dfusion", "oracle", 0.20, of=of),
        *runs("ddpo", "vanilla", "clip", -0.02, 2, of=of),
        *runs("grpo", "vanilla", "clip", 0.07, 2, of=of),
        collapsed(HOSTILE[1], algorithm="grpo", builder="vanilla", seed=2, of=of),
        *runs("<img src=x onerror='window.hit=4'>", "same-noise", "clip", 0.03, 1, of=of),
        *runs("kto", "vanilla", "clip", 0.04, 1, of=of),
    ]
    leave(folder, *every)
    register(folder, record("kto", "vanilla", "clip", 1, of=of), f"OSError: {HOSTILE[0]}")
    register(folder, record("sft", "vanilla", "clip", 0, of=of))
    own = cell(folder, "dpo-dfusion-clip-s0")
    Image.new("RGB", (1600, 400), "#3060a0").save(own / "base_trained.png")
    Image.new("RGB", (300, 200), "#a06030").save(own / "triples.png")
    (cell(folder, "dpo-vanilla-clip-s0") / "triples.png").write_bytes(b"no picture")
    return folder


def runs(algorithm: str, builder: str, reward: str, gain: float, seeds: int = 3, **more: Any) -> list[Record]:
    """Seed s gains `gain` + 0.01 × s, alternately more and less by prompt; their curves have the budget's rounds."""
    own = [[gain + 0.01 * s + sign * 0.02 for sign in (1, -1, 1, -1)] for s in range(seeds)]
    return [record(algorithm, builder, reward, s, gains=g, **more) for s, g in enumerate(own)]


def collapsed(evidence: str, **names: Any) -> Record:
    """A run that collapsed after its second round of three."""
    return record(**names, gains=None, evidence=evidence, queries=64, rounds=2)


def cell(folder: Path, name: str) -> Path:
    (found,) = folder.glob(f"*/{name}-????????")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_folder(tmp_path_factory.mktemp("report") / "runs")


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    path = folder.parent / "report.html"
    report.write(leaderboard.boards(folder), path)
    return path


# ---- what the file holds


def test_the_same_records_give_the_same_bytes(folder: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (board,) = leaderboard.boards(folder)
    turned = leaderboard.Board(board.records[::-1], board.unfinished[::-1], board.paths[::-1])
    assert report.html([turned]).encode() == page.read_bytes()
    monkeypatch.chdir(folder.parent)  # where it is called from does not show
    assert report.html(leaderboard.boards(Path(folder.name))).encode() == page.read_bytes()
    report.leaderboard_picture(board, folder.parent / "a.svg")
    report.leaderboard_picture(turned, folder.parent / "b.svg")
    assert (folder.parent / "a.svg").read_bytes() == (folder.parent / "b.svg").read_bytes()
    assert str(folder) not in page.read_text()


def test_embedded_json_cannot_end_its_element_and_reads_back() -> None:
    value = {"a": "</script><!--&\u2028\u2029", "é": [1, None]}
    text = str(report.embedded(value))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


def test_the_policy_names_exactly_the_scripts_in_the_page(page: Path) -> None:
    text = page.read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and policy[1].startswith("default-src 'none'; img-src data:")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert re.findall(r"'sha256-([^']+)'", policy[1]) == hashes and len(hashes) == 2
    assert "\r" not in text and not re.search(r'(src|href)="(?!#|data:)', text)


def test_pareto_front_by_hand() -> None:
    #          cheap, low  dominated  equal to 0  best      dear, worse  same gain, dearer
    points = [(1.0, 0.1), (2.0, 0.05), (1.0, 0.1), (3.0, 0.4), (4.0, 0.3), (5.0, 0.4)]
    assert report.pareto(points) == [0, 2, 3]
    assert report.pareto([]) == []
    assert report.pareto([(1.0, 0.2), (1.0, 0.3)]) == [1]


def test_only_rows_that_may_rank_are_on_the_front(folder: Path) -> None:
    (board,) = leaderboard.boards(folder)
    data = content.of_board(board, content.Pictures())["data"]
    on_it = {tuple(data["rows"][i]["name"]) for own in data["fronts"].values() for i in own}
    # Both cost the same and the other rows are a ceiling, a miss, checkpoints and incomplete ones.
    assert on_it == {("dpo", "dfusion", "clip")}


def test_every_row_says_why_it_has_no_rank_and_every_number_is_the_tables(folder: Path) -> None:
    (board,) = leaderboard.boards(folder)
    page = content.of_board(board, content.Pictures())
    states = {(r["algorithm"], r["builder"], r["reward"]): r["state"] for r in page["rows"]}
    assert states.pop(("<img src=x onerror='window.hit=4'>", "same-noise", "clip")) == "checkpoint"
    assert states == {
        ("dpo", "dfusion", "clip"): "ranked",
        ("dpo", "vanilla", "clip"): "ranked",
        ("dpo", "dfusion", "oracle"): "ceiling",
        ("ddpo", "vanilla", "clip"): "checkpoint",
        ("grpo", "vanilla", "clip"): "miss",
        ("kto", "vanilla", "clip"): "incomplete",
        ("sft", "vanilla", "clip"): "incomplete",
    }
    table = tables.table(board).set_index(["algorithm", "builder", "reward"])
    for row in page["rows"]:
        line = table.loc[(row["algorithm"], row["builder"], row["reward"])]
        gain = row["cells"]["0 gain"].sort
        assert gain is None if math.isnan(line["oracle gain"]) else gain == line["oracle gain"]
        assert row["cells"]["kl"].sort == (None if math.isnan(line["kl"]) else line["kl"])
    ceiling = next(r for r in page["rows"] if r["state"] == "ceiling")
    assert ceiling["cells"]["0 gain"].mark == "trained" and ceiling["cells"]["1 gain"].mark == ""


def test_curves_are_means_and_ranges_over_seeds_and_collapsed_runs_stand_alone(folder: Path) -> None:
    one, two = runs("dpo", "dfusion", "clip", 0.1, 2, rounds=3)
    steeper = [r.model_copy(update={"reward": (r.reward or 0) * 2}) for r in two.rounds]
    board = leaderboard.Board((one, two.model_copy(update={"rounds": steeper}), collapsed("no", seed=2)))
    curve = content.of_board(board, content.Pictures())["data"]["rows"][0]["curve"]
    assert curve["runs"] == 2
    assert curve["band"] == [[32, 0.0, 0.0, 0.0], [64, 0.15, 0.1, 0.2], [96, 0.3, 0.2, 0.4]]
    assert curve["collapsed"] == [[[32, 0.0], [64, 0.1]]]


def test_pictures_are_made_small_and_what_is_left_out_is_named(
    folder: Path, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text()
    assert text.count('src="data:image/webp;base64,') == 2 and 'width="1280" height="320"' in text
    assert f"Not readable as pictures: {cell(folder, 'dpo-vanilla-clip-s0').name}/triples.png" in text
    monkeypatch.setattr(content, "MOST_PICTURES", 1)
    fewer = report.html(leaderboard.boards(folder))
    assert fewer.count('src="data:image/webp;base64,') == 1
    assert f"Left out for that: {cell(folder, 'dpo-dfusion-clip-s0').name}/triples.png" in fewer
    monkeypatch.setattr(content, "MOST_PICTURES", 9)
    monkeypatch.setattr(content, "MOST_BYTES", 10)
    assert "data:image/webp" not in report.html(leaderboard.boards(folder))


def test_a_track_without_a_finished_run_and_records_from_python_have_a_page() -> None:
    text = report.html([leaderboard.Board((collapsed("NaN in round 2"),))])
    assert "No run of this track has finished" in text and "NaN in round 2" in text
    assert "No base_trained.png or triples.png lies beside these records" in text
    with pytest.raises(UsageError, match="no run of toy-v1 has finished"):
        report.leaderboard_picture(leaderboard.Board((collapsed("no"),)), Path("never.svg"))


def test_nothing_to_report_on_is_a_mistake_of_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no record"):
        report.write([], tmp_path / "report.html")
    with pytest.raises(UsageError, match="is a directory"):
        report.write([leaderboard.Board((record(),))], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_published_records_make_a_page_of_modest_size() -> None:
    boards = leaderboard.boards(Path(__file__).parent.parent / "leaderboards")
    records = sum(len(b.records) for b in boards)
    assert records >= 60
    assert len(report.html(boards).encode()) < 120_000 + 12_000 * records


def test_control_characters_are_seen_and_ticks_are_round() -> None:
    assert visible("a\x1b[0m\tb\n\x00\x7f\u202ec\x85\ud800") == "a␛[0m\tb\n␀␡⟨U+202E⟩c⟨U+0085⟩?"
    assert ticks(-0.013, 0.081) == [0.0, 0.02, 0.04, 0.06, 0.08]
    assert ticks(0.0, 1.0, 4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(2.0, 2.0) == [2.0]


# ---- the command


def test_the_command_writes_the_page_and_the_picture(
    folder: Path, page: Path, tmp_path: Path, said: Callable[..., Any]
) -> None:
    status, out, _ = said("report", folder, cwd=tmp_path)
    assert status == 0 and "report.html: 16 runs of toy-v1" in out
    assert (tmp_path / "report.html").read_bytes() == page.read_bytes()
    assert said("report", folder, "--to", "deep/page.html").status == 0
    assert (tmp_path / "deep" / "page.html").is_file()
    assert said("leaderboard", folder, "--picture", "docs/board.svg").status == 0
    assert (tmp_path / "docs" / "board.svg").read_text().startswith("<svg ")


def test_what_the_command_refuses_it_refuses_before_writing(
    folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    leave(tmp_path / "two", record(), record(of=track(version=2)))
    (tmp_path / "empty").mkdir()
    for words, expected in (
        (("report", "nowhere"), "unknown track 'nowhere'"),
        (("report", "empty"), "no run below empty"),
        (("report", "two", "--to", "empty"), "empty is a directory"),
        (("leaderboard", "two", "--picture", "a.svg"), "holds 2 (toy-v1, toy-v2)"),
        (("leaderboard", folder, "--picture", "a.png"), "name it a.svg"),
        (("leaderboard", folder, "--picture", "a.svg", "--csv"), "exclude each other"),
    ):
        assert expected in refused(*words, cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "two"]


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for this file. Where BENCH_DFUSION_BROWSER is set, as in .ci/run, a missing one is a failure."""
    if binaries() is None:
        if os.environ.get("BENCH_DFUSION_BROWSER"):
            pytest.fail(HOW)
        pytest.skip(HOW)
    session = Browser()
    try:
        yield session
    finally:
        session.close()


@pytest.fixture
def reader(browser: Browser, page: Path) -> Browser:
    """The page, freshly opened on a wide light screen, with empty logs."""
    browser.scheme("light")
    browser.size(1400)
    browser.open(page)
    browser.console(), browser.requests()
    return browser


COLUMN = """
const [key] = arguments, table = document.querySelector(".board");
const heads = [...table.tHead.rows[1].cells], at = heads.findIndex((h) => h.dataset.key === key);
return [[...table.tBodies[0].rows].map((r) => r.cells[at].querySelector(".value, .open")?.textContent ?? r.cells[at].textContent),
  heads.map((h) => h.getAttribute("aria-sort")).filter(Boolean), heads[at].getAttribute("aria-sort")];
"""


def numbers(texts: list[str]) -> list[float]:
    """What a column shows, as numbers; nan for a dash."""
    plain = [t.strip().rstrip("†").replace("−", "-").replace("∞", "inf").replace(",", "") for t in texts]
    return [math.nan if t == "–" else float(t) for t in plain]


def test_headers_sort_by_mouse_and_keyboard(reader: Browser) -> None:
    texts, _, order = reader.run(COLUMN, "0 gain")
    first = numbers(texts)
    known = [v for v in first if not math.isnan(v)]
    assert order == "descending" and known == sorted(known, reverse=True) and known[-1] == -math.inf
    assert math.isnan(first[-1]) and len(known) == len(first) - 1
    reader.click('th[data-key="0 gain"] button')
    texts, orders, order = reader.run(COLUMN, "0 gain")
    assert order == "ascending" and orders == ["ascending"]
    values = numbers(texts)
    assert values[:-1] == sorted(known) and math.isnan(values[-1])  # what is missing stays last
    reader.run("document.querySelector('th[data-key=\"algorithm\"] button').focus()")
    reader.press("Enter")
    texts, orders, order = reader.run(COLUMN, "algorithm")
    assert order == "ascending" and orders == ["ascending"]
    assert texts[1:] == ["ddpo", "dpo", "dpo", "dpo", "grpo", "kto", "sft"]
    reader.press("Space")
    assert reader.run(COLUMN, "algorithm")[0][:7] == ["sft", "kto", "grpo", "dpo", "dpo", "dpo", "ddpo"]
    reader.click('th[data-key="rank"] button')
    assert reader.run(COLUMN, "rank")[0][:2] == ["1", "2"]


SHOWN = 'return [...document.querySelectorAll(".board tbody tr")].filter((r) => r.checkVisibility()).length'


def test_filters_narrow_the_table_and_its_charts(reader: Browser) -> None:
    assert reader.run(SHOWN) == 8
    reader.type('input[name="words"]', "DPO oracle")
    assert reader.run(SHOWN) == 1
    assert reader.run('return document.querySelector(".count").textContent') == "1 of 8 rows"
    cost = '[data-chart="cost"] .point'
    assert reader.run(f"return document.querySelectorAll('{cost}:not(.off)').length") == 1
    assert (
        reader.run('return [...document.querySelectorAll(".pictures figure")].some((f) => f.checkVisibility())')
        is False
    )
    reader.type('input[name="words"]', " nonsense")
    assert reader.run(SHOWN) == 0 and reader.run('return document.querySelector(".nothing").checkVisibility()')
    reader.click(".nothing button")
    reader.until(f"return ({SHOWN.removeprefix('return ')}) === 8")
    choose = 'const s = document.querySelector(`select[name="${arguments[0]}"]`); s.value = arguments[1]; s.dispatchEvent(new Event("input", { bubbles: true })); return s.value'
    for name, value, left in (("state", "incomplete", 2), ("algorithm", "kto", 1), ("builder", "dfusion", 0)):
        assert reader.run(choose, name, value) == value
        assert reader.run(SHOWN) == left


OPEN = 'return document.getElementById("dialog").open'
DIALOG = 'return document.getElementById("dialog").innerText'


def test_a_row_opens_its_records_by_mouse_and_by_keyboard(reader: Browser, folder: Path) -> None:
    best = '.board tr[data-state="ranked"]'
    reader.click(f"{best} td.ranking")
    assert reader.run(OPEN)
    reader.run('document.querySelectorAll("dialog details").forEach((d) => (d.open = true))')
    reader.until('return document.querySelectorAll("dialog details details table").length > 0')
    text = reader.run(DIALOG)
    for word in ("rank 1", "Mean of 3 runs", "Seed 0", "Seed 2", "algo.beta", "20", "what oracle measures"):
        assert word in text
    for word in (
        "0123456789abcdef",
        "a processor, 1 threads",
        f"{cell(folder, 'dpo-dfusion-clip-s2').name}/record.json",
        "100 MB",
    ):
        assert word in text
    assert "+0.120" in text  # prompt 0 of seed 0: 0.5 → 0.62
    assert reader.run('return document.querySelectorAll("dialog img").length') == 2
    reader.press("Escape")
    assert not reader.run(OPEN)
    reader.run(f"document.querySelector('{best} .open').focus()")
    reader.press("Enter")
    assert reader.run(OPEN)
    assert reader.run('return document.getElementById("dialog").contains(document.activeElement)')
    reader.press("Escape")
    assert not reader.run(OPEN)
    assert reader.run("return document.activeElement.className") == "open"
    reader.click('.board tr[data-state="incomplete"] .open')
    assert "no record" in reader.run(DIALOG)
    reader.click("dialog .close")
    assert not reader.run(OPEN)
    # Closed and opened again at once: what the closing clears is not what was opened.
    reader.run(
        "const open = document.querySelector('.open'); open.click(); document.getElementById('dialog').close(); "
        "open.click(); await new Promise((done) => setTimeout(done, 100))"
    )
    assert "Runs" in reader.run(DIALOG)


def test_the_first_stop_of_the_keyboard_skips_to_the_tables(reader: Browser) -> None:
    reader.press("Tab")
    assert reader.run("return document.activeElement.className") == "skip"
    assert reader.run("return document.activeElement.getBoundingClientRect().left >= 0")
    reader.press("Enter")
    assert reader.run("return document.activeElement.id") == "main"


def test_the_theme_follows_the_system_until_it_is_chosen_and_is_remembered(reader: Browser, page: Path) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = reader.run(ground)
    reader.scheme("dark")
    dark = reader.run(ground)
    assert light != dark
    try:
        reader.click("#theme")
        assert reader.run(ground) == light
        reader.open(page)
        assert reader.run(ground) == light
        reader.click("#theme")
        assert reader.run(ground) == dark
    finally:
        reader.run("localStorage.clear()")


def test_what_records_say_is_text_and_does_nothing(reader: Browser) -> None:
    for number in range(8):
        reader.run("document.querySelector(`.board tr[data-row='${arguments[0]}'] .open`).click()", number)
        reader.run('document.querySelectorAll("dialog details").forEach((d) => (d.open = true))')
        state = reader.run(
            "return document.querySelector(`.board tr[data-row='${arguments[0]}']`).dataset.state", number
        )
        if state != "incomplete":
            reader.until('return document.querySelectorAll("dialog details details table").length > 0')
            reader.run('document.querySelectorAll("dialog details").forEach((d) => (d.open = true))')
        text = reader.run(DIALOG)
        if state == "ranked":
            for prompt in PROMPTS:
                assert visible(prompt) in text
        if state == "miss":
            assert HOSTILE[1] in text
        reader.press("Escape")
    assert HOSTILE[0] in page_text(reader, '.board tr[data-algorithm="kto"] .open')
    assert reader.run("return window.hit ?? null") is None
    assert (
        reader.run(
            'return document.querySelectorAll("[onerror], img[src=x], body script:not([type]):not(:last-of-type)").length'
        )
        == 0
    )
    assert reader.console() == []


def page_text(reader: Browser, selector: str) -> str:
    reader.click(selector)
    text = str(reader.run(DIALOG))
    reader.press("Escape")
    return text


def test_a_phone_has_no_sideways_scroll(reader: Browser) -> None:
    reader.size(360, 740, phone=True)
    reader.until('return document.querySelector(".plot svg").viewBox.baseVal.width < 360')
    wide = "return [document.documentElement.scrollWidth, document.querySelector('.scroll').scrollWidth > 360]"
    assert reader.run(wide) == [360, True]
    reader.click(".board .open")
    reader.run('document.querySelectorAll("dialog details").forEach((d) => (d.open = true))')
    reader.until('return document.querySelectorAll("dialog details details table").length > 0')
    assert reader.run('const d = document.getElementById("dialog"); return d.scrollWidth <= d.clientWidth')
    assert reader.run("return document.documentElement.scrollWidth") == 360


def test_the_page_asks_no_network_and_its_policy_forbids_it(browser: Browser, page: Path) -> None:
    asked: list[str] = []

    class Ear(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    browser.open(page)  # away from whatever was open before
    browser.requests(), browser.console()
    browser.open(page)
    addresses = browser.requests()
    assert page.resolve().as_uri() in addresses
    assert all(a.startswith(("file:", "data:")) for a in addresses)
    assert browser.console() == []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ear) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        tried = browser.run(
            """
            const [where] = arguments;
            const by = (tag, set) => new Promise((done) => { const e = Object.assign(document.createElement(tag), set);
              e.onload = () => done("loaded"); e.onerror = () => done("refused"); document.head.append(e); });
            return Promise.all([fetch(where + "/fetch").then(() => "loaded", () => "refused"), by("img", { src: where + "/img" }),
              by("script", { src: where + "/script" }), by("link", { rel: "stylesheet", href: where + "/style" })]);
            """,
            where,
        )
        server.shutdown()
    assert tried == ["refused"] * 4 and asked == []


def test_charts_show_every_row_they_can_and_names_do_not_overlap(reader: Browser) -> None:
    count = "return document.querySelectorAll(arguments[0]).length"
    assert reader.run(count, '[data-chart="cost"] .point') == 6  # not the miss, nor the row without a record
    assert reader.run(count, '[data-chart="cost"] .point.hollow') == 4
    assert reader.run(count, '[data-chart="cost"] .front') == 1
    for cost in ("queries", "seconds", "kl"):
        reader.run(
            'const s = document.querySelector("select[name=cost]"); s.value = arguments[0]; s.dispatchEvent(new Event("change"))',
            cost,
        )
        assert reader.run(count, '[data-chart="cost"] .point') == 6
        assert overlaps(reader, '[data-chart="cost"] text.name') == []
    # dpo twice: two rewards; a run of one round has no line
    assert reader.run(count, '[data-chart="curves"] .plot svg') == 5
    assert reader.run(count, '[data-chart="curves"] .collapsed') == 1
    assert reader.run(count, '[data-chart="rise"] .point') == 16 - 1
    assert reader.run(count, ".forest tbody tr") == 1
    assert reader.run(count, ".plot title") > 20
    assert reader.run(
        'return [...document.querySelectorAll("img")].every((i) => i.alt && i.complete && i.naturalWidth > 0)'
    )
    reader.click('[data-chart="cost"] .point use')
    assert reader.run(OPEN)


OVERLAPS = """
const boxes = [...document.querySelectorAll(arguments[0])].map((t) => [t.textContent, t.getBoundingClientRect()]);
const found = [];
boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
  if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 2 && q.top < p.bottom - 2) found.push(`${a} / ${b}`);
}));
return found;
"""


def overlaps(reader: Browser, selector: str) -> list[str]:
    return list(reader.run(OVERLAPS, selector))


def test_the_picture_has_a_line_a_row_and_no_text_over_text(browser: Browser, tmp_path: Path) -> None:
    long = "an-algorithm-with-a-name-that-never-ends-" * 3
    own = [
        *runs("dpo", "dfusion", "clip", 0.1),
        *runs(long, "界" * 60, "clip", 0.3),
        *runs("dpo", "vanilla", "oracle", 0.2),
        *runs("ddpo", "branch", "clip", 0.05, 1),
        collapsed("no", algorithm="<b>&", builder="same-noise"),
    ]
    path = tmp_path / "board.svg"
    report.leaderboard_picture(leaderboard.Board(tuple(own)), path)
    browser.size(1000)
    browser.open(path)
    assert browser.run("return document.documentElement.nodeName") == "svg"
    assert browser.run("return document.querySelectorAll('text').length") > 15
    assert overlaps(browser, "text") == []
    assert browser.run(
        "const w = document.documentElement.getBoundingClientRect(); return [...document.querySelectorAll('text')].every((t) => "
        "{ const b = t.getBoundingClientRect(); return b.left >= w.left && b.right <= w.right && b.bottom <= w.bottom; })"
    )
    text = path.read_text()
    assert "<b>" not in text and "&lt;b&gt;&amp;" in text and "−∞" in text
    assert text.count('fill="#ffffff" stroke="') == 1 + 2  # the ground, the ceiling and the checkpoint
    assert text.count("<circle") + text.count("<polygon") == 5 + 4  # the legend and the rows that have a gain
