"""What stands in the code is not written twice: `{{ ... }}` alone on a line of a page is filled in while it is read.

{{ config }}            every field of fipa_jax/config/defaults.py, its default and the comment beside it
{{ flags scripts/X }}   the options of a command, from its source
{{ usage scripts/X }}   the docstring of a command
{{ file NAME }}         a Markdown file of the repository's root, or a sentence where it is missing
{{ names MODULE.TABLE }}   a dictionary of names and what they mean
"""

import ast
import importlib
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = "fipa_jax/config/defaults.py"
REPOSITORY_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#|mailto:)(?!docs/)[^)]*\)")


def config_tables() -> str:
    """A heading and a table for every group of fields."""
    source = (ROOT / DEFAULTS).read_text()
    tree, comments = ast.parse(source), comments_of(source)
    makers = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    pages = []
    for name, node in makers.items():
        if name.startswith("_"):  # a group within another's table
            continue
        fields = list(_fields(node, comments, makers))
        pages += [f"## {_title(name)}", "", ast.get_docstring(node), ""]
        pages += ["| field | default | meaning |", "|---|---|---|"]
        pages += [f"| `{field}` | {_shown(value)} | {_cell(words)} |" for field, value, words in fields]
        pages += [""]
    return "\n".join(pages)


OF_A_PHASE = ("local", "term", "sketch", "aggregator", "server", "late", "faults")


def _title(name):
    if name in OF_A_PHASE:
        return f"`config.fipa.{name}` and `config.warmup.{name}`"
    special = {
        "default": "The run: `config`",
        "evaluation": "`config.eval`",
        "phase": "`config.fipa` and `config.warmup`",
    }
    return special.get(name, f"`config.{name}`")


def comments_of(source: str) -> dict[int, tuple[str, bool]]:
    """{line: (comment, whether it has the line to itself)} of a file."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return {t.start[0]: (t.string.lstrip("# "), t.line.lstrip().startswith("#")) for t in comments}


def _fields(node, comments, makers):
    """(path, default as written, comment) of every field that a function of the defaults sets."""
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Attribute):
            value = statement.value
            is_group = isinstance(value, ast.Call) and getattr(value.func, "id", "") in makers
            if not is_group:
                yield statement.targets[0].attr, value, words_beside(statement, comments)
        elif isinstance(statement, ast.Return) and isinstance(statement.value, ast.Call):
            for argument in statement.value.args:
                yield from _items(argument, "", comments, makers)


def _items(tree, before, comments, makers):
    """The same of a dictionary, whose groups are dictionaries too, or what a function makes."""
    for key, value in zip(tree.keys, tree.values, strict=True):
        if isinstance(value, ast.Dict):
            yield from _items(value, f"{before}{key.value}.", comments, makers)
        elif isinstance(value, ast.Call) and getattr(value.func, "id", "") in makers:
            for path, default, words in _fields(makers[value.func.id], comments, makers):
                yield f"{before}{key.value}.{path}", default, words
        else:
            yield before + key.value, value, words_beside(value, comments)


def words_beside(node: ast.AST, comments: dict) -> str:
    """The comment beside a statement, or else the lines of comment above it."""
    for line in range(node.lineno, node.end_lineno + 1):
        if line in comments:
            return comments[line][0]
    above, line = [], node.lineno - 1
    while line in comments and comments[line][1]:
        above, line = [comments[line][0], *above], line - 1
    return " ".join(above)


def _shown(value):
    return f"`{ast.unparse(value)}`"


def _cell(words):
    """Words in a cell of a table: what looks like code is set as code."""
    words = re.sub(
        r"(?<!`)(--config\.[\w.]+=\w+|\bconfig\.[\w.]+\w|\b[a-z_]+\.[a-z_]+\.[A-Za-z_.]+\w)(?!`)", r"`\1`", words
    )
    return words.replace("|", "\\|").replace("*", "\\*")


def flag_table(script: str) -> str:
    """A table of a command's options, absl's or argparse's, from its source."""
    rows = []
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr == "add_argument":
            words = {word.arg: word.value for word in node.keywords}
            rows.append((ast.literal_eval(node.args[0]), words.get("help"), words.get("default")))
        elif node.func.attr.startswith("DEFINE_"):
            rows.append((f"--{ast.literal_eval(node.args[0])}", node.args[-1], node.args[1]))
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for name, words, default in rows:
        given = "" if default is None or ast.unparse(default) in ("None", "''") else f"`{ast.unparse(default)}`"
        lines.append(f"| `{name}` | {given} | {_cell(ast.literal_eval(words)) if words else ''} |")
    return "\n".join(lines)


def usage(script: str) -> str:
    """A command's docstring, as it is printed by --help."""
    return "```text\n" + ast.get_docstring(ast.parse((ROOT / script).read_text())) + "\n```"


def file(name: str) -> str:
    """A file of the repository's root; its links into the repository become words, those to these pages stay."""
    if not (ROOT / name).is_file():
        return f"# {Path(name).stem.capitalize()}\n\nThere is no `{name}` in this copy."
    return REPOSITORY_LINK.sub(r"\1", (ROOT / name).read_text()).replace("](docs/", "](")


def names(path: str) -> str:
    """A table of a dictionary {name: what it means}."""
    module, _, name = path.rpartition(".")
    rows = getattr(importlib.import_module(module), name).items()
    return "\n".join(["| name | meaning |", "|---|---|", *(f"| `{key}` | {_cell(words)} |" for key, words in rows)])


WRITERS = {"config": config_tables, "flags": flag_table, "usage": usage, "file": file, "names": names}
PLACE = re.compile(r"^\{\{ (\w+) ?(\S*) \}\}$", re.MULTILINE)


def filled(text: str) -> str:
    """A page with all its places filled in."""

    def write(match):
        return WRITERS[match[1]](*filter(None, [match[2]]))

    return PLACE.sub(write, text)


def _fill(app, docname, source):
    source[0] = filled(source[0])


def setup(app):
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
