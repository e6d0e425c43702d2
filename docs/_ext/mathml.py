"""Mathematics as MathML, which browsers show without a script and without a network."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError


def to_mathml(latex: str, display: str) -> str:
  """The MathML of a formula; several lines of a block stand under each other."""
  try:
    return convert(latex.strip(), display=display)
  except Exception as error:
    raise ExtensionError(f"mathematics that can't be set: {latex!r}") from error


def visit_math(translator, node: nodes.math) -> None:
  translator.body.append(to_mathml(node.astext(), "inline"))
  raise nodes.SkipNode


def visit_math_block(translator, node: nodes.math_block) -> None:
  translator.body.append(translator.starttag(node, "div", CLASS="math-block"))
  translator.body.append(to_mathml(node.astext(), "block"))
  translator.body.append("</div>\n")
  raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
  app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
  return {"parallel_read_safe": True, "parallel_write_safe": True}
