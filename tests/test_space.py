"""The report page as a static Space beside the published dataset."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import boards
import numpy as np
import pytest
import yaml
from boards import leave
from hub_server import Hub
from PIL import Image

from bench_dfusion.errors import UsageError
from bench_dfusion.publish import dataset, repository, space, tree
from bench_dfusion.results import leaderboard
from bench_dfusion.results.leaderboard import Board

REPO = "somebody/table"
TINY = boards.track({"a red ring": "single", "a cyan square": "single"}, name="tiny", seeds=3)
record = partial(boards.record, gains=0.1, of=TINY)
OURS = [record(seed=s) for s in range(3)]
THEIRS = [record("ddpo", "vanilla", seed=s) for s in range(3)]


@pytest.fixture
def own(tmp_path: Path) -> list[Board]:
    folder = leave(tmp_path / "runs", *OURS)
    path = next(folder.rglob("record.json"))
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(path.with_name("base_trained.png"))
    return leaderboard.boards(folder)


def published(hub: Hub, found: list[Board], **options) -> str:
    done = repository.to_hub(found, REPO, endpoint=hub.url, space=True)
    return space.to_hub(done.content, found, REPO, endpoint=hub.url, **options)


def files_of(hub: Hub, name: str) -> dict[str, bytes]:
    return dict(hub.repos[name].files)


def test_the_page_and_the_dataset_link_each_other_and_the_page_shows_what_others_published(hub, own) -> None:
    where = published(hub, [Board(tuple(THEIRS))])
    assert where == f"{hub.url}/spaces/{REPO}"
    published(hub, own)
    made = files_of(hub, f"spaces/{REPO}")
    card = made["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["sdk"] == "static" and head["app_file"] == "index.html" and head["datasets"] == [REPO]
    page = made["index.html"].decode()
    home = f"{hub.url}/datasets/{REPO}"
    assert f'href="{home}"' in page and home in card
    assert ">ddpo<" in page and ">dpo<" in page and page.count("data:image/webp") == 1, "both, and one's own pictures"
    assert "/tmp/" not in page, "no path of this machine"
    assert f"\nThe same as a page: <{where}>\n" in files_of(hub, REPO)["README.md"].decode()


def test_a_publication_without_it_keeps_the_link_and_the_same_page_is_not_committed_twice(hub, own) -> None:
    where = published(hub, own)
    commits = len(hub.repos[f"spaces/{REPO}"].commits)
    assert published(hub, own) == where and len(hub.repos[f"spaces/{REPO}"].commits) == commits
    repository.to_hub([Board(tuple(THEIRS))], REPO, endpoint=hub.url)
    assert tree.space_in(files_of(hub, REPO)["README.md"].decode()) == where


def test_a_space_of_something_else_is_left_alone_and_that_of_the_hub_is_taken(hub, own) -> None:
    hub.create(f"spaces/{REPO}", {"README.md": b"---\nsdk: gradio\n---", "app.py": b"x"})
    with pytest.raises(UsageError, match=f"the Space {REPO} holds something else: remove it"):
        published(hub, own)
    assert set(files_of(hub, f"spaces/{REPO}")) == {
        ".gitattributes",
        "README.md",
        "app.py",
    } and dataset.README in files_of(hub, REPO)
    fresh = {"README.md": b"---\nsdk: static\n---", "index.html": b"hello", "style.css": b"", ".gitattributes": b""}
    hub.repos[f"spaces/{REPO}"] = hub.create("spaces/x/y", fresh)
    published(hub, own)
    assert dataset.MARK in files_of(hub, f"spaces/{REPO}")["README.md"].decode()


def test_what_passes_is_tried_again_and_what_does_not_is_one_line(hub, own) -> None:
    done = repository.to_hub(own, REPO, endpoint=hub.url, space=True)
    hub.faults.append(lambda handler: handler.error(503, "busy") or True)
    space.to_hub(done.content, own, REPO, endpoint=hub.url)
    hub.repos.pop(f"spaces/{REPO}")
    hub.faults.append(lambda handler: handler.error(403, "no spaces for you") or True)
    with pytest.raises(UsageError, match="may not write to somebody/table"):
        space.to_hub(done.content, own, REPO, endpoint=hub.url)


def test_the_command_says_where_the_page_is_and_what_went_wrong_with_it(hub, hub_home, own, tmp_path, said) -> None:
    words = ("publish", "--from", tmp_path / "runs", "--space")
    done = said(*words, REPO)
    assert done.status == 0 and f"page: {hub.url}/spaces/{REPO}" in done.out
    hub.repos[f"spaces/{REPO}"] = hub.create("spaces/x/y", {"README.md": b"", "app.py": b"x"})
    failed = said(*words, REPO)
    assert failed.status == 2 and "the dataset is published, and its Space is not: the Space" in failed.err
    refused = said(*words, REPO, "--pr")
    assert refused.status == 2 and "--space goes with a dataset of your own: leave --pr out" in refused.err


def test_a_directory_has_the_page_below_it(own, tmp_path, said) -> None:
    done = said("publish", "--from", tmp_path / "runs", "--space", "--to", tmp_path / "made")
    page = tmp_path / "made" / "space" / "index.html"
    assert done.status == 0 and f"page: {page}" in done.out.replace("\n", "")
    assert 'href=".."' in page.read_text()
    assert "The same as a page: <space/index.html>" in (tmp_path / "made" / "README.md").read_text()
    again = said("publish", "--from", tmp_path / "runs", "--to", tmp_path / "made")
    assert again.status == 0 and page.is_file() and "it was there already" in again.out
