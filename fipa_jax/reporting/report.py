"""One page on a run, report.html: results, pictures, warnings, what was run, how to go on. It needs no other file.

Whatever a user has named (methods, paths, classes) is text here, never markup.
"""

import base64
import json
import os
import platform
import re
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import jax

from fipa_jax import files
from fipa_jax.aggregate.screening import REASONS
from fipa_jax.aggregate.solvers import FALLBACKS
from fipa_jax.config.defaults import default
from fipa_jax.curvature import sketch
from fipa_jax.reporting import curves, metrics
from fipa_jax.reporting.console import NOTED

LARGE = 2**20  # bytes of an SVG beyond which the page holds the PNG
WIDE = 2.6  # the ratio of width to height above which a picture is moved sideways on a telephone, by itself
# Columns of the metrics file that count clients -> what is said of them.
COUNTS = (
    {f"rejected_{reason}": f"left out: {words}" for reason, words in REASONS.items()}
    | {f"clients_{field}": words for field, words in NOTED.items()}
    | {f"sketches_{flag}": words for flag, words in sketch.FLAGS.items() if flag not in sketch.EXPECTED}
)
STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #566072; --page: #ffffff; --card: #f5f7fa; --line: #d9dee6;
  --warn: #9a4a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e9f0; --soft: #a3adbd; --page: #14181f; --card: #1d232d;
  --line: #353d4a; --warn: #ffb066; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { margin: .4rem 0; } .soft, figcaption, td small { color: var(--soft); }
td small { display: block; font-weight: 400; }
td small, td code, td span, pre { overflow-wrap: anywhere; }
td.n span { white-space: nowrap; } td.head { min-width: 9rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.best { font-weight: 700; } code, pre { font: .85rem/1.45 ui-monospace, monospace; }
pre { background: var(--card); padding: .7rem .9rem; border-radius: .5rem; white-space: pre-wrap; margin: .4rem 0; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
figure img { display: block; max-width: 100%; max-height: 34rem; margin: 0 auto; padding: .6rem; }
figcaption { background: var(--card); padding: .4rem .8rem; font-size: .85rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.pictures figure:first-child { grid-column: 1 / -1; }
figure { display: flex; flex-direction: column; justify-content: space-between; }
svg.look { width: 2rem; height: .7rem; margin-right: .5rem; background: #fff; border-radius: .2rem; }
.warn { color: var(--warn); }
@media (max-width: 40rem) { body { padding: .8rem; } .panels div { overflow-x: auto; }
  .panels img { max-width: none; width: 46rem; } table.wide thead { display: none; }
  table.wide, table.wide tbody { display: block; }
  table.wide tr { display: block; background: var(--card); border-radius: .5rem; margin-bottom: .6rem; padding: .3rem; }
  table.wide td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .15rem .4rem;
    text-align: right; }
  table.wide td::before { content: attr(data-of); color: var(--soft); text-align: left; white-space: nowrap; }
  table.wide td.head { display: block; text-align: left; font-weight: 600; } td.head::before { display: none; } }
"""
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
<p class="soft">$state</p>
<h2>Results</h2>
$results
<h2>Pictures</h2>
$pictures
<h2>Warnings</h2>
$warnings
<h2>What was run</h2>
$settings
<h2>How to go on</h2>
$further
<h2>Where it ran</h2>
$origin
</body>
</html>
""")


def write(
    workdir: Path,
    rows: Sequence[dict],
    summary: dict,
    pictures: dict[str, str],
    rounds: dict[str, int],
    command: str = "",
) -> None:
    """Writes report.html of a run into its work directory, from what is there and these.

    Args:
      workdir: with config.json, origin.json, start.json and the pictures.
      rows: of the metrics file so far.
      summary: what summary.json holds.
      pictures: {name of a file without its ending: caption}; those that are not there are passed over.
      rounds: {name of a phase: its rounds}.
      command: that the run was started with, if it is known.
    """
    config, origin = (_read(workdir / name) for name in ("config.json", "origin.json"))
    looks = curves.looks([name for name in config.get("compare", ()) if name != curves.WARMUP])
    names = ", ".join(look.label for look in looks.values())
    page = PAGE.substitute(
        style=STYLE,
        title=escape(f"{title_of(config)}: {names}" if names else title_of(config)),
        state=escape(_state(rows, rounds)),
        results=_results(summary["runs"], rows, looks) + _constant(workdir) + _personal(summary["runs"]),
        pictures=_pictures(workdir, pictures),
        warnings=_warnings(rows),
        settings=_settings(config),
        further=_further(workdir, command, summary),
        origin=_origin(origin),
    )
    files.write(workdir / "report.html", page.encode())


def _read(path: Path) -> dict:
    """What a JSON file holds; nothing where it is not there."""
    return files.read_json(path) if path.is_file() else {}


def title_of(config: dict) -> str:
    """What is learned, in a few words: the task, with its data set, equation or file."""
    task = config.get("task", {})
    which = {"images": config.get("data", {}).get("name"), "pde": task.get("equation")}
    which["own_data"] = Path(task.get("file", "")).name
    return which.get(task.get("name")) or task.get("name", "run")


def _state(rows: Sequence[dict], rounds: dict[str, int]) -> str:
    """How far the run is, and when that was."""
    now = time.strftime("%Y-%m-%d %H:%M %Z")
    if not rows:
        return f"No round is done as of {now}."
    done, last = Counter(row["run"] for row in rows), {row["run"]: row for row in rows}
    ended = {name for name, row in last.items() if row.get("ended_early")}
    left = sum(max(number - done[name], 0) for name, number in rounds.items() if name not in ended)
    done = f"{len(rows)} of {len(rows) + left} rounds" if left else f"All {len(rows)} rounds"
    return f"{done} are done, as of {now}; the last one was round {rows[-1]['round']} of {rows[-1]['run']}."


def _results(runs: dict, rows: Sequence[dict], looks: dict[str, curves.Look]) -> str:
    """The table of the compared methods: each figure's final and best value, what was sent, and the time."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run["final"] if name.startswith("test_")))
    columns = [(name, which) for name in names for which in ("final", "best")]
    heads = [f"{curves.words_of(name).removesuffix(' (%)')}, {which}" for name, which in columns]
    best = {column: _best(runs, *column) for column in columns}
    lines = []
    for run, result in runs.items():
        cells = [(_named(run, looks.get(run)), "head")]
        for name, which in columns:
            value = result[which].get(name)
            is_best = value is not None and value == best[name, which]
            cells.append(("no number" if value is None else f"{value:.4g}", "n best" if is_best else "n"))
        lines.append(cells + [(text, "n") for text in _cost([row for row in rows if row["run"] == run])])
    spent = {run: result["epsilon"] for run, result in runs.items() if "epsilon" in result}
    if spent:  # in the place of the seconds, which would tell how many clients worked
        for run, line in zip(runs, lines, strict=True):
            line[-1] = (f"{spent[run]:.3g}" if run in spent else "no privacy", "n")
    return _table(["method", *heads, "rounds", "MB sent", "epsilon" if spent else "seconds"], lines)


def _personal(runs: dict) -> str:
    """A table of the clients' own models for each method and figure; nothing where there are none."""
    page = ""
    for run, result in runs.items():
        lines = metrics.personal(result["final"])
        for metric in dict.fromkeys(line[0] for line in lines):
            cells = {(way, number): values for name, way, number, values in lines if name == metric}
            ways, numbers = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
            heads = ["the clients' own models", *(f"{number or 'all'} own examples" for number in numbers)]
            rows = [[(way, "head"), *((_in_a_row(cells[way, number]), "n") for number in numbers)] for way in ways]
            words = curves.words_of(f"test_{metric}").removesuffix(" (%)")
            page += f"\n<p>After {escape(run)}, {words}: mean of the clients, worst tenth, spread</p>\n"
            page += _table(heads, rows)
    return page


def _in_a_row(values: Sequence[float | None]) -> str:
    return ", ".join("no number" if value is None else f"{value:.3g}" for value in values)


def _constant(workdir: Path) -> str:
    """What a constant answer has on the test set, where the task knows one."""
    words = _read(workdir / "start.json").get("constant", "")
    return f'<p class="soft">{escape(words)}</p>' if words else ""


def _cost(rows: Sequence[dict]) -> tuple[str, str, str]:
    """(rounds, megabytes sent both ways, seconds) of a method's rows."""
    sent = sum(row.get("bytes_up", 0) + row.get("bytes_down", 0) for row in rows)
    seconds = sum(value for row in rows for name, value in row.items() if name.startswith("seconds_"))
    return str(len(rows)), f"{sent / 1e6:.4g}", f"{seconds:.4g}"


def _best(runs: dict, name: str, which: str) -> float | None:
    """The best value of several methods, but for the ceiling."""
    values = [run[which].get(name) for method, run in runs.items() if method.partition(":")[0] != curves.CEILING]
    numbers = [value for value in values if value is not None]
    return (max if metrics.direction(name) > 0 else min)(numbers) if len(numbers) > 1 else None


def _named(run: str, look: curves.Look | None) -> str:
    """A method's line in the pictures, its name, and in small what `config.compare` calls it."""
    if look is None:
        return escape(run)
    dash = "" if look.dash == "-" else f' stroke-dasharray="{" ".join(str(2 * part) for part in look.dash[1])}"'
    line = f'<line x1="0" y1="5" x2="32" y2="5" stroke="{look.color}" stroke-width="3"{dash}/>'
    drawn = f'<svg class="look" viewBox="0 0 32 10" aria-hidden="true">{line}</svg>'
    return f"{drawn}{escape(look.label)}<small>{escape(run)}</small>"


def _table(heads: Sequence[str], lines: Sequence[Sequence[tuple[str, str]]]) -> str:
    """A table of cells (markup, class); each says of which column it is, as on a telephone a row is a card."""
    kinds = [kind.partition(" ")[0] for _, kind in lines[0]] if lines else [""] * len(heads)
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in zip(heads, kinds, strict=True))
    body = ""
    for cells in lines:
        tags = [f'<td class="{kind}" data-of="{escape(of)}">' for of, (_, kind) in zip(heads, cells, strict=True)]
        row = "".join(f"{tag}<span>{text}</span></td>" for tag, (text, _) in zip(tags, cells, strict=True))
        body += f"<tr>{row}</tr>\n"
    return f'<table class="wide">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>'


def _pictures(workdir: Path, pictures: dict[str, str]) -> str:
    """The pictures that are there, each in the page itself: an SVG, or the PNG where that is large."""
    shown = []
    for stem, caption in pictures.items():
        found = [workdir / f"{stem}.{ending}" for ending in ("svg", "png")]
        if all(path.is_file() for path in found):
            path = found[0] if found[0].stat().st_size < LARGE else found[1]
            kind = "svg+xml" if path.suffix == ".svg" else "png"
            source = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
            image = f'<div><img src="{source}" alt="{escape(caption)}"></div>'
            kind = ' class="panels"' if _is_wide(found[0]) else ""
            shown.append(f"<figure{kind}>{image}<figcaption>{escape(caption)}</figcaption></figure>\n")
    return f'<div class="pictures">{"".join(shown)}</div>' if shown else "<p>There are none yet.</p>"


def _is_wide(path: Path) -> bool:
    """Whether an SVG has panels beside each other that a telephone's width would make too small to read."""
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', path.read_text())
    return size is not None and float(size[1]) > WIDE * float(size[2])


def _warnings(rows: Sequence[dict]) -> str:
    """What was wrong with rounds and clients, in how many rounds, and how often a client was concerned."""
    lines = []
    for run in dict.fromkeys(row["run"] for row in rows):
        for words, counts in _faults([row for row in rows if row["run"] == run]).items():
            lines.append([(escape(run), "head"), (escape(words), ""), (str(len(counts)), "n"), (str(sum(counts)), "n")])
    if not lines:
        return "<p>None: no client was left out, no round was skipped.</p>"
    return _table(["method", "what", "rounds", "clients or rounds in all"], lines)


def _faults(rows: Sequence[dict]) -> dict[str, list[int]]:
    """{what was wrong: the number of clients in each round in which it was; 1 for the round itself}."""
    found: dict[str, list[int]] = {}
    for row in rows:
        counts = {words: row.get(column) for column, words in COUNTS.items()}
        counts["the round was skipped: too few clients, or parameters that are not finite"] = row.get("skipped")
        if row.get("fallback"):
            counts[f"the step was not finite or exploded: {FALLBACKS[row['fallback']]} was taken"] = 1
        none = [name for name in row if metrics.direction(name) and row[name] is None]
        counts["a figure of the evaluation was not finite"] = bool(none)
        for words, count in counts.items():
            if count:
                found.setdefault(words, []).append(int(count))
    return found


def _settings(config: dict) -> str:
    """The fields that differ from the defaults, those of a phase without rounds left out."""
    if not config:
        return "<p>The config is not there.</p>"
    ours, defaults = dict(_flat(config)), dict(_flat(json.loads(default().to_json_best_effort())))
    idle = tuple(f"{phase}." for phase in ("warmup", "fipa") if not config[phase]["rounds"])
    differ = [name for name in ours if ours[name] != defaults.get(name) and not name.startswith(idle)]
    lines = [
        [(f"<code>{escape(name)}</code>", "head"), *((escape(_value(of.get(name))), "") for of in (ours, defaults))]
        for name in differ
    ]
    return _table(["field of the config", "here", "default"], lines) if lines else "<p>All fields as by default.</p>"


def _value(value: Any) -> str:
    """A field's value as one would write it on the command line."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value) if value != "" else "(empty)"


def _further(workdir: Path, command: str, summary: dict) -> str:
    """Commands that go on from here: the rest of the run, its models, other seeds."""
    parts = ["<p>The same command goes on from the last checkpoint, where the run was stopped:</p>"] if command else []
    parts += [f"<pre>{escape(command)}</pre>"] if command else []
    models = sorted(path.name for path in workdir.glob("*.msgpack"))
    if models:
        code = f"from fipa_jax.saving.model_files import load\nparams = load({str(workdir / models[0])!r})"
        parts += [f"<p>The models are {escape(', '.join(models))}. To load one:</p><pre>{escape(code)}</pre>"]
    draw = f"python scripts/summarise.py {shlex.quote(str(workdir))} MORE_FOLDERS --plot=seeds.svg"
    seeds = "With the same config, another <code>--config.seed</code> and another <code>--workdir</code>"
    parts += [f"<p>{seeds}, mean and spread over seeds are a table and a picture:</p><pre>{escape(draw)}</pre>"]
    parts += ["<p>All figures of every round are in metrics.jsonl, all fields of the config in config.json.</p>"]
    return "\n".join(parts)


def _origin(origin: dict) -> str:
    """Versions and hardware."""
    code = origin.get("code", {})
    versions = ", ".join(f"{name} {code[name]}" for name in ("fipa_jax", "jax", "jaxlib") if name in code)
    device = f"{jax.device_count()} x {code.get('device', jax.devices()[0].device_kind)}"
    lines = [
        f"{versions}, Python {platform.python_version()}; source {code.get('source', 'unknown')}",
        f"{device}, {os.cpu_count()} CPU cores, {platform.platform()}",
    ]
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(a.b.c, value) of nested dictionaries."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
