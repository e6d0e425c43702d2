"""Signatures as they stand in the source: types by the names that it gives them.

Evaluated, ``optax.ScalarOrSchedule`` and its kin are unions of a hundred words.
"""

import inspect
from typing import Any

from sphinx.application import Sphinx


def written(annotation: Any) -> str:
  """An annotation that was not evaluated."""
  name = getattr(annotation, "__forward_arg__", annotation)
  return name if isinstance(name, str) else inspect.formatannotation(name)


def shown(parameter: inspect.Parameter, typed: bool) -> str:
  """One argument; a default that is an object shows the call that makes it."""
  stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
  text = stars.get(parameter.kind, "") + parameter.name
  if typed and parameter.annotation is not parameter.empty:
    text += f": {written(parameter.annotation)}"
  if parameter.default is not parameter.empty:
    text += f" = {default(parameter.default)}"
  return text


def default(value: Any) -> str:
  if inspect.isfunction(value):
    return value.__name__
  same = type(value).__module__.startswith("asam_jax") and value == type(value)()
  return f"{type(value).__name__}()" if same else repr(value)


def process(app: Sphinx, what: str, name: str, obj: Any, options, signature, returned):
  """The arguments and the result, for what has any."""
  del app, name, options, returned
  if signature is None or what not in ("class", "function", "method"):
    return None
  found = inspect.signature(obj)
  # The entries of a NamedTuple are described below it, with their shapes.
  typed = not (what == "class" and issubclass(obj, tuple))
  parts, starred = [], False
  for parameter in found.parameters.values():
    if what == "method" and parameter.name == "self":
      continue
    if parameter.kind is parameter.KEYWORD_ONLY and not starred:
      parts.append("*")
    starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
    parts.append(shown(parameter, typed))
  result = found.return_annotation
  if what == "class" or result is found.empty:
    return f"({', '.join(parts)})", None
  return f"({', '.join(parts)})", written(result)


def setup(app: Sphinx) -> dict[str, bool]:
  app.setup_extension("sphinx.ext.autodoc")
  app.connect("autodoc-process-signature", process)
  return {"parallel_read_safe": True}
