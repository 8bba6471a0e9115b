"""What does a reader see of a study? A part of docs/results/NAME.md, its picture, and the figures behind it as JSON.

What a person has written around that part stays.
"""

import json
import re
from pathlib import Path

import numpy as np

from evidence.records import Found, Spread, Study, Table, question
from fipa_jax import files
from fipa_jax.reporting import console
from fipa_jax.reporting.metrics import jsonable

BEGIN = "% study {name}: what follows is written by scripts/study.py"
END = "% end of the study"
VERSIONS = {"Python": "python", "jax": "jax", "fipa_jax": "fipa_jax", "source": "source"}  # in words -> of a run


def write(name: str, study: Study, found: Found, command: str, docs: Path, size: str) -> Path:
    """Writes the study's part of its page, the picture and the figures; returns the page.

    Args:
      command: that prints it.
      docs: the folder of the documentation.
      size: full, reduced or debug.
    """
    page = docs / "results" / f"{name}.md"
    tables = study.tables(found) if found.made else []
    pictured = bool(found.made and study.draw) and console.attempt(
        "the picture", _draw, study, found, docs / "pictures" / f"study_{name}"
    )
    if found.made:
        _save(page.parent / "figures" / f"{name}.json", name, tables, found)
    text = page.read_text() if page.is_file() else f"# {name.replace('_', ' ').capitalize()}\n"
    begin = BEGIN.format(name=name)
    if begin not in text:
        text = f"{text.rstrip()}\n\n{begin}\n{END}\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    part = "\n".join(_part(name, study, found, tables, command, size, pictured))
    page.parent.mkdir(parents=True, exist_ok=True)
    files.write(page, f"{before}{begin}\n\n{part}\n\n{END}{after}".encode())
    return page


def _draw(study: Study, found: Found, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    study.draw(found, path)
    return True


def _part(name, study, found, tables, command, size, pictured):
    """The lines of a study's part of its page."""
    _, _, setting = study.words.partition("\n\n")
    yield f"**{question(study)}**\n\n{setting.strip()}\n"
    yield f"```sh\n{command}\n```"
    if size == "reduced" and study.reduced:
        yield f"\nAt reduced size: {study.reduced.words} Full size takes {_about(study)}.\n"
    if not found.made:
        yield f"\nNot run yet, so that there are no figures. It takes {_about(study)}."
    for table in tables:
        yield f"\n{table.words}\n"
        yield from lines_of(table)
    if pictured:
        yield f"\n![{study.caption}](../pictures/study_{name}.svg)\n\n*{study.caption}*"
    if found.missing:
        yield f"\nMissing: {'; '.join(found.missing)}."
    if found.made:
        yield f"\n{_made(study, found)} [The figures of every seed](figures/{name}.json)."


def _about(study: Study) -> str:
    return f"about {_hours(study.hours)} of {study.machine}"


def _hours(hours: float) -> str:
    if hours >= 10:
        return f"{hours:.0f} hours"
    words = f"{hours:.2g} hour" if hours >= 1 else f"{max(round(60 * hours), 1)} minute"
    return words if words.startswith("1 ") else f"{words}s"


def lines_of(table: Table) -> list[str]:
    """A table in Markdown."""
    names = list(dict.fromkeys(name for row in table.rows for name in row))
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in table.rows:
        cells = [cell_of(row.get(name, "-")) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def cell_of(cell: str | Spread) -> str:
    """A cell in words."""
    if isinstance(cell, Spread):
        return cell.show(cell.values) if cell.values.size else "not run"
    return cell


def _made(study: Study, found: Found) -> str:
    """When and with what the runs were made."""
    own = [name for name in found.runs if name not in study.runs or not study.runs[name].seeds]
    seeds = ", ".join(map(str, sorted({seed for name in own for seed in found.runs[name]})))

    facts = [made | made["versions"] for made in found.made]

    def each(field):
        return ", ".join(sorted({str(fact[field]) for fact in facts if field in fact}))

    hours, cores = sum(made["seconds"] for made in found.made) / 3600, each("cores")
    of_all = f" of {found.planned}" if len(found.made) < found.planned else ""
    by = [f"{name} {each(field)}" for name, field in VERSIONS.items() if each(field)]
    return (
        f"Seeds {seeds}. {len(found.made)}{of_all} runs, {each('date')}, {_hours(hours)} in all, each on {cores} "
        f"{'core' if cores == '1' else 'cores'} of an {each('processor')}; {', '.join(by)}."
    )


def _save(path: Path, name: str, tables: list[Table], found: Found) -> None:
    """Writes the figures of every seed, with mean and standard deviation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = [{"words": table.words, "rows": [_raw(row) for row in table.rows]} for table in tables]
    runs = [made | {"command": _anywhere(made["command"])} for made in found.made]
    content = {"study": name, "tables": saved, "missing": found.missing, "runs": runs}
    files.write(path, (json.dumps(jsonable(content), indent=1) + "\n").encode())


def _anywhere(command: str) -> str:
    """A command without this machine's folders."""
    plain = re.sub(r"(data\.dir=)\S+", r"\1DIR", command.replace(f"{Path.cwd()}/", ""))
    plain = re.sub(r"(config=)/\S*?/(configs/)", r"\1\2", plain)
    ends = r"((?:workdir|init_from|out|run)=)/\S*?/([^/\s]+(?:/[^/\s]+\.\w+)?)(?=\s|$)"  # a run, or a file of one
    return re.sub(ends, r"\1runs/studies/\2", plain)


def _raw(row: dict) -> dict:
    with np.errstate(over="ignore", invalid="ignore"):  # of a method that diverges
        return {
            name: {"seeds": cell.values, "mean": cell.values.mean(), "std": cell.values.std()}
            if isinstance(cell, Spread) and np.size(cell.values)
            else cell_of(cell)
            for name, cell in row.items()
        }
