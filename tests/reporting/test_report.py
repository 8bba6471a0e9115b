"""The page on a run: it needs no other file, holds no markup of a user's, and says what differs and what went wrong."""

import re
from html.parser import HTMLParser

import pytest
from helpers.runs import tiny

from fipa_jax.reporting import curves, report
from fipa_jax.run import whole_run

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def page_of(workdir, rows, compare=("fipa", "fedavg:server.lr=0.5"), command="", rounds=None, **fields):
    """The page that `report.write` makes of these rows."""
    pytest.importorskip("matplotlib")
    workdir.mkdir(exist_ok=True)
    config = tiny(compare=compare, **fields)
    (workdir / "config.json").write_text(config.to_json_best_effort())
    curves.draw([rows], ["test_mse"], workdir / "curves.png")
    summary = whole_run.summary_of(dict.fromkeys(compare, config), rows)
    rounds = rounds or dict.fromkeys(compare, config.fipa.rounds)
    report.write(workdir, rows, summary, {"curves": f"curves {EVIL}", "gone": "not there"}, rounds, command)
    text = (workdir / "report.html").read_text()
    return Page(text), text


def row(run, k, **columns):
    return {"run": run, "round": k, "test_mse": 0.5 / (k + 1), "bytes_up": 3, "bytes_down": 2} | columns


def test_the_page_needs_no_other_file_and_shows_users_words_as_text(tmp_path):
    rows = [row(f"fipa{EVIL}", 0)]
    page, text = page_of(tmp_path / EVIL.replace("/", ""), rows, (f"fipa{EVIL}",), f"python {EVIL}")
    names = {tag for tag, _ in page.tags}
    assert "script" not in names and "link" not in names and EVIL in page.text
    sources = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset") if name in attrs]
    assert len(sources) == 1 and sources[0].startswith("data:image/svg+xml;base64,")
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", re.sub(r'src="[^"]*"', "", text))
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_the_page_says_what_differs_from_the_defaults_alone(tmp_path):
    page, _ = page_of(tmp_path, [row("fipa", 0)], seed=7)
    assert "fipa.sketch.rank" in page.text and "seed" in page.text
    assert "fipa.local.lr" not in page.text and "warmup." not in page.text


def test_the_page_shows_methods_in_the_colours_of_the_curves(tmp_path):
    names = ("fipa", "fedavg:server.lr=0.5")
    page, _ = page_of(tmp_path, [row(name, 0) for name in names], names)
    strokes = [attrs["stroke"] for tag, attrs in page.tags if tag == "line"]
    assert strokes == [curves.looks(names)[name].color for name in names]
    drawn = (tmp_path / "curves.svg").read_text().lower()
    assert all(color.lower() in drawn for color in strokes)


@pytest.mark.parametrize(
    ("done", "said"),
    [
        ({"fipa": 4}, "4 of 6 rounds are done"),
        ({"fipa": 4, "fedavg:rounds=2": 1}, "5 of 6 rounds are done"),
        ({"fipa": 4, "fedavg:rounds=2": 2}, "All 6 rounds are done"),
        ({"fipa": -3, "fedavg:rounds=2": 2}, "All 5 rounds are done"),
    ],
)
def test_the_page_says_how_far_the_run_is(tmp_path, done, said):
    """By the methods' own rounds; one that has ended early, here after 3, has no more to do."""
    rows = [row(name, k) for name, rounds in done.items() for k in range(abs(rounds))]
    if done["fipa"] < 0:
        rows[2]["ended_early"] = True
    page, _ = page_of(tmp_path, rows, ("fipa", "fedavg:rounds=2"), rounds={"fipa": 4, "fedavg:rounds=2": 2})
    assert said in page.text


def test_the_page_counts_what_went_wrong(tmp_path):
    fine, _ = page_of(tmp_path / "fine", [row("fipa", 0, clients_rejected=0, skipped=False, fallback=0)])
    assert "no client was left out" in fine.text
    bad = [row("fipa", k, rejected_update_not_finite=2, skipped=k == 1, fallback=2) for k in range(3)]
    page, _ = page_of(tmp_path / "bad", [*bad, row("fipa", 3, test_mse=None)])
    by_beginning = {words.split(":")[0]: counts for words, counts in report._faults(bad).items()}
    once = {"the round was skipped": [1], "the step was not finite or exploded": [1, 1, 1]}
    assert by_beginning == {"left out": [2, 2, 2]} | once
    assert "not finite" in page.text and "no number" in page.text and "skipped" in page.text
