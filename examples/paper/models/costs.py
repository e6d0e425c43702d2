"""What a network costs: its parameters, and the multiplications of one image."""

import math
from typing import Any

from flax import linen as nn
import jax
from jax.extend import core


def variables_of(model: nn.Module, *inputs: Any) -> Any:
  """The shapes of a network's variables; nothing is computed.

  Args:
    model: called as ``model(*inputs, train)``.
    *inputs: arrays or ``jax.ShapeDtypeStruct``s.
  """

  def init(key, *inputs):
    return model.init(key, *inputs, False)

  return jax.eval_shape(init, jax.random.key(0), *inputs)


def parameters(model: nn.Module, *inputs: Any) -> int:
  """The number of trained numbers, running statistics of batch norm not counted."""
  leaves = jax.tree.leaves(variables_of(model, *inputs)["params"])
  return sum(math.prod(leaf.shape) for leaf in leaves)


def multiply_adds(model: nn.Module, *inputs: Any) -> int:
  """Multiplications with additions in convolutions and products, going forward.

  Evaluation mode; padding counts as pixels. What is elementwise is not counted, as in
  the published figures. An operation is two FLOPs; a gradient costs about three times
  the forward pass.

  Args:
    model: called as ``model(*inputs, train)``.
    *inputs: a batch of one as arrays or ``jax.ShapeDtypeStruct``s.
  """

  def forward(variables, *inputs):
    return model.apply(variables, *inputs, False)

  variables = variables_of(model, *inputs)
  return _count(jax.make_jaxpr(forward)(variables, *inputs).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
  total = 0
  equation: Any
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      ((contracted, _), _) = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      depth = math.prod(shape[i] for i in contracted)
      total += depth * math.prod(equation.outvars[0].aval.shape)
    elif equation.primitive.name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      features = equation.params["dimension_numbers"].rhs_spec[0]
      depth = math.prod(kernel) // kernel[features]
      total += depth * math.prod(equation.outvars[0].aval.shape)
    for inner in _inner(equation):
      total += _count(inner)
  return total


def _inner(equation: Any) -> list[core.Jaxpr]:
  """The programs that an operation calls once."""
  inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
  return [value for value in inner if isinstance(value, core.Jaxpr)]
