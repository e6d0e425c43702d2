"""The site. Built strictly and offline: ``python -m tools.build_site``."""

from pathlib import Path
import shutil
import sys

from docutils import nodes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE / "_ext")]

import asam_jax  # noqa: E402
from tools import home  # noqa: E402  (after the path)

project = "asam_jax"
author = "The asam_jax authors"
copyright = author
version = release = asam_jax.__version__

extensions = [
    "mathml",
    "signatures",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
]
exclude_patterns = ["_ext"]

# Pages.
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks' outputs are committed, and checked apart

# API pages, from the docstrings.
autodoc_typehints = "signature"
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = "asam_jax"
html_static_path = ["_static"]
html_css_files = ["asam_jax.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
if home.url():
  html_theme_options |= {"repository_url": home.url(), "use_repository_button": True}

# Where names of other projects are described. No inventory is downloaded.
_JAX = "https://docs.jax.dev/en/latest"
_OPTAX = "https://optax.readthedocs.io/en/latest"
_FLAX = "https://flax.readthedocs.io/en/latest"
EXTERNAL = {
    "numpy": "https://numpy.org/doc/stable",
    "jax": _JAX,
    "jaxtyping": "https://docs.kidger.site/jaxtyping",
    "flax": _FLAX,
    "nnx": _FLAX,
    "optax": _OPTAX,
    "collections": "https://docs.python.org/3/library/collections.abc.html",
    "typing": "https://docs.python.org/3/library/typing.html",
}
NAMES = {
    "Any": "typing",
    "Array": "jax",
    "Callable": "collections",
    "Float": "jaxtyping",
    "Mapping": "collections",
    "PRNGKeyArray": "jaxtyping",
    "Sequence": "collections",
}


def external(app, env, node, contnode):
  """Names of other projects lead to their documentation, in place of a warning.

  And the package's own lead to their entry from its subpackages, which import them.
  """
  target = node["reftarget"]
  own = f"asam_jax.{target}"
  if node.get("refdomain") == "py" and own in env.domains["py"].objects:
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, "obj", own, node, contnode
    )
  top = NAMES.get(target, target.split(".")[0])
  if top not in EXTERNAL:
    return None
  link = nodes.reference("", "", internal=False, refuri=EXTERNAL[top])
  link += contnode
  return link


def link_pictures(app, doctree):
  """Pictures of results have much in them: each leads to itself in full size."""
  del app
  for picture in doctree.findall(nodes.image):
    if "results/" in picture["uri"]:
      picture.setdefault("width", "100%")  # what Sphinx shrinks, it links


def copy_notebooks(app):
  """Sphinx reads what lies under docs; the notebooks live with the examples."""
  del app
  target = HERE / "notebooks"
  shutil.rmtree(target, ignore_errors=True)
  target.mkdir()
  for notebook in sorted((ROOT / "examples/notebooks").glob("*.ipynb")):
    shutil.copy(notebook, target)


def setup(app):
  app.connect("builder-inited", copy_notebooks)
  app.connect("doctree-read", link_pictures)
  app.connect("missing-reference", external)
