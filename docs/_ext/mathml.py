"""Formulas as MathML, which browsers draw by themselves: no script, no fonts to fetch.

The converter is docutils' own. A formula that it does not know is a warning of the build, and shown as it is written.
"""

import html
import re

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
OTHER_NAMES = {"dots": "ldots", "lVert": "|", "rVert": "|", "lvert": "|", "rvert": "|", "coloneqq": ":="}


def in_mathml(formula: str, as_block: bool) -> str:
    """A LaTeX formula as MathML; names that the converter lacks stand for those that it has.

    Raises:
      docutils.utils.math.MathError: a command is not known.
    """

    def named(match):
        other = OTHER_NAMES.get(match[1], match[1])
        return other if other in ("|", ":=") else f"\\{other}"

    return latex2mathml.tex2mathml(re.sub(r"\\([A-Za-z]+)", named, formula), as_block=as_block)


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
