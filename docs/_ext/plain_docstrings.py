"""The package's docstrings are plain text in Google's style: code in single backticks, equations set in.

Here they become reStructuredText: characters that it would read as markup are escaped, and what is set in stands as it
is written. The sections themselves are left to napoleon. Fields of a NamedTuple have the comment beside them.
"""

import ast
import functools
import inspect
import re
import sys
import textwrap

from written_at_build import comments_of, words_beside

SECTIONS = {"Args": 6, "Returns": 6, "Raises": 6, "Yields": 6, "Warns": 6, "Attributes": 6, "": 4}  # name: set in by
MARKUP = re.compile(r"([*|\\]|_(?!\w))")


def converted(lines: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText with Google's sections."""
    result = []
    for name, body in _sections(lines):
        if name == "Example":
            result += [".. rubric:: Example", "", *_example(body), ""]
        elif name == "Returns":  # napoleon would take all before a colon for a type
            text = "\n".join(_text(body, SECTIONS[name])).strip().splitlines()
            result += [f":returns: {text[0]}", *(f"  {line}" for line in text[1:]), ""]
        else:
            result += [*([f"{name}:"] if name else []), *_text(body, SECTIONS[name]), ""]
    return result


def _sections(lines):
    """[(name, lines)] of a docstring; the first has no name."""
    sections = [("", [])]
    for line in lines:
        named = re.fullmatch(r"(\w+):", line)
        if named and named[1] in (*SECTIONS, "Example"):
            sections.append((named[1], []))
        else:
            sections[-1][1].append(line)
    return sections


def _text(lines, edge):
    """Prose, of which runs of lines that are set in by at least `edge` become literal blocks."""
    result, literal = [], False
    for place, line in enumerate(lines):
        deep = _indent(line) >= edge
        if not line.strip():
            following = next((after for after in lines[place:] if after.strip()), "")
            literal = literal and _indent(following) >= edge
            result.append("")
        elif deep:
            base = " " * (edge - 2 if edge == 6 else 0)
            if not literal:
                result += ["", f"{base}.. code-block:: text", ""]
            result.append(f"{base}   {line[edge:]}")
            literal = True
        else:
            result += ["", _escaped(line)] if literal else [_escaped(line)]
            literal = False
    return result


def _example(lines):
    """Code; a first paragraph of words in front of what is set in more deeply is prose."""
    text = "\n".join(lines).strip("\n").split("\n\n")
    words = text[0] if len(text) > 1 and _edge(text[1]) > _edge(text[0]) and text[0].strip()[0].isupper() else ""
    code = "\n\n".join(text[1:] if words else text)
    prose = [_escaped(line.strip()) for line in words.splitlines()]
    return [
        *prose,
        "",
        ".. code-block:: python",
        "   :force:",
        "",
        *("   " + x[_edge(code) :] for x in code.splitlines()),
    ]


def _indent(line):
    return len(line) - len(line.lstrip())


def _edge(text):
    """By how much all lines of a text are set in."""
    return min(_indent(line) for line in text.splitlines() if line.strip())


def _escaped(line):
    """A line of prose: what stands in backticks as code, all else as it is written."""
    pieces = re.split(r"(`[^`]+`)", line)
    marked = "".join(f"`{piece}`" if piece.startswith("`") else MARKUP.sub(r"\\\1", piece) for piece in pieces)
    return re.sub(r"``(?=[A-Za-z])(?<=[^ (]``)", r"``\\ ", marked)  # `Part`s: the end of code in a word


def _convert(app, what, name, obj, options, lines):
    lines[:] = converted(lines)


def _field(app, what, name, obj, options, lines):
    """After napoleon, which would take `words: more words` for a type."""
    if lines and lines[0].startswith("Alias for field number"):
        owner, _, field = name.rpartition(".")
        lines[:] = [_escaped(_fields(owner).get(field, ""))]


@functools.cache
def _fields(owner):
    """{field: the comment beside it} of a NamedTuple, by its dotted name."""
    module, _, name = owner.rpartition(".")
    source = textwrap.dedent(inspect.getsource(getattr(sys.modules[module], name)))
    comments, (tree,) = comments_of(source), ast.parse(source).body
    return {node.target.id: words_beside(node, comments) for node in tree.body if isinstance(node, ast.AnnAssign)}


def _without_fields(app, what, name, obj, options, signature, returns):
    """A NamedTuple's fields are listed below it: its signature would only repeat them."""
    return ("", None) if what == "class" and hasattr(obj, "_fields") else None


def setup(app):
    app.connect("autodoc-process-signature", _without_fields)
    app.connect("autodoc-process-docstring", _convert, priority=100)
    app.connect("autodoc-process-docstring", _field, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
