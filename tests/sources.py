"""What source code says, for the tests of the house."""

import ast


def imported(node: ast.AST) -> list[str]:
  """The dotted names that an import statement takes; of other nodes, none."""
  if isinstance(node, ast.Import):
    return [alias.name for alias in node.names]
  if isinstance(node, ast.ImportFrom) and node.module:
    return [f"{node.module}.{alias.name}" for alias in node.names]
  return []
