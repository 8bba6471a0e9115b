"""Formulas as MathML, which browsers draw by themselves: no script, no fonts to fetch.

The converter is docutils' own. A formula that it does not know is a warning of the build, and shown as it is written.
"""

import html
import re
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
SPACE = "{http://www.w3.org/1998/Math/MathML}"
ElementTree.register_namespace("", SPACE[1:-1])
ACCENTS, BARS = "\u02c6\u02c9\u02dc^\u00af", "|\u2016"  # hat, bar, tilde; of a norm
OTHER_NAMES = {"dots": "ldots", "lVert": "|", "rVert": "|", "lvert": "|", "rvert": "|", "coloneqq": ":="}


def in_mathml(formula: str, as_block: bool) -> str:
    """A LaTeX formula as MathML; names that the converter lacks stand for those that it has.

    Raises:
      docutils.utils.math.MathError: a command is not known.
    """

    def named(match):
        other = OTHER_NAMES.get(match[1], match[1])
        return other if other in ("|", ":=") else f"\\{other}"

    converted = latex2mathml.tex2mathml(re.sub(r"\\([A-Za-z]+)", named, formula), as_block=as_block)
    # Entities of HTML, which XML lacks; its own five stay.
    tree = ElementTree.fromstring(
        re.sub(r"&(?!(?:amp|lt|gt|quot|apos);)\w+;", lambda name: html.unescape(name[0]), converted)
    )
    _mend(tree)
    return ElementTree.tostring(tree, encoding="unicode")


def _mend(tree: ElementTree.Element) -> None:
    """An index beside a letter with an accent, not below it; no room around the bars of a norm."""
    for node in tree.iter():
        if node.tag == f"{SPACE}munderover" and node[2].text in ACCENTS:
            letter, index, accent = node
            node.tag = f"{SPACE}msub"
            over = ElementTree.Element(f"{SPACE}mover", accent="true")
            over.extend([letter, accent])
            node[:] = [over, index]
        if node.tag == f"{SPACE}mo" and node.text and node.text in BARS:
            node.attrib |= {"lspace": "0", "rspace": "0"} | ({} if node.text == "|" else {"stretchy": "false"})


def _convert(node: nodes.Node, as_block: bool) -> str:
    try:
        return in_mathml(node.astext(), as_block)
    except Exception as error:
        LOGGER.warning("formula %r: %s", node.astext(), error, location=node)
        return f"<code>{html.escape(node.astext())}</code>"


def _visit_inline(self, node):
    self.body.append(_convert(node, False))
    raise nodes.SkipNode


def _visit_block(self, node):
    self.body.append(f'<div class="formula">{_convert(node, True)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
