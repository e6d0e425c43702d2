"""What a step costs, read from the compiled step: FLOPs, memory, compilations."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import asam_jax
from benchmarks import networks
from benchmarks import steps
from benchmarks import timing

ASAM = ("adaptive_sam", "value_and_grad")
BY_HAND = {"sam": "SAM by hand"} | dict.fromkeys(ASAM, "ASAM by hand")


@pytest.fixture(scope="module", params=["mlp", "cnn"])
def costs(request):
  """The cost of each compiled step on the quickstart's networks, batch 64."""
  problem = networks.problem(request.param, 64)
  params = jax.eval_shape(problem.init)
  methods = steps.steps(problem.loss)
  return {
      name: timing.compiled_cost(
          steps.compile_step(methods[name], params, problem.batch)
      )
      for name in ("plain SGD", *BY_HAND, *set(BY_HAND.values()))
  }


@pytest.mark.parametrize("method", ASAM)
def test_asam_step_has_the_flops_of_two_gradients(costs, method):
  # At a batch of 64, the perturbation's dozen per weight are 1 % of a gradient's.
  assert 2.00 <= costs[method]["flops"] / costs["plain SGD"]["flops"] <= 2.022


def test_sam_step_has_the_flops_of_two_gradients(costs):
  assert 1.99 <= costs["sam"]["flops"] / costs["plain SGD"]["flops"] <= 2.01


@pytest.mark.parametrize("method", BY_HAND)
def test_step_has_the_memory_of_two_gradients(costs, method):
  by_hand = costs[BY_HAND[method]]["temporary_bytes"]
  assert 0 < costs[method]["temporary_bytes"] <= 1.01 * by_hand


@pytest.mark.parametrize("method", BY_HAND)
def test_second_step_does_not_compile(method):
  step = steps.steps(lambda w, x: jnp.sum((w["w"] * x - 1) ** 2))[method]
  traces = []

  @jax.jit
  def counted(params, state, batch):
    traces.append(method)
    return step.step(params, state, batch)

  params = {"w": jnp.arange(4.0)}
  state = step.init(params)
  for i in range(3):
    params, state, _ = counted(params, state, jnp.full(4, i + 1.0))
  assert len(traces) == 1


def perturbation_cost(leaves, dtype, p=2, normalization="elementwise"):
  """Of 100 M parameters: (bytes of temporaries over theirs, FLOPs each)."""
  tx = asam_jax.ascent(0.5, 0.01, p, normalization=normalization)
  leaf = jax.ShapeDtypeStruct((100_000 // leaves, 10, 100), dtype)
  ws = [leaf] * leaves

  def perturb(ws, gs):
    return tx.update(gs, tx.init(ws), ws)[0]

  compiled = jax.jit(perturb, donate_argnums=1).lower(ws, ws).compile()
  cost = timing.compiled_cost(compiled)
  held = 100_000_000 * jnp.dtype(dtype).itemsize
  return cost["temporary_bytes"] / held, cost["flops"] / 100_000_000


@pytest.mark.parametrize("normalization", ["elementwise", "filterwise", "none"])
@pytest.mark.parametrize("leaves", [5, 500])
def test_perturbation_alone(leaves, normalization):
  """No temporary, a dozen FLOPs each."""
  held, flops = perturbation_cost(leaves, jnp.float32, 2, normalization)
  assert held <= 0.005
  assert flops <= (14.1 if normalization == "filterwise" else 13.1)


@pytest.mark.parametrize("normalization", ["elementwise", "none"])
def test_perturbation_of_bfloat16_is_not_held_wider(normalization):
  held, _ = perturbation_cost(5, jnp.bfloat16, 2, normalization)
  assert held <= 0.2


@pytest.mark.parametrize(("dtype", "normalization", "most"), [
    ("bfloat16", "filterwise", 2.01),  # XLA:CPU holds what two reductions widen
    ("float16", "elementwise", 4.01),  # and float16 before it fuses anything
    ("float16", "filterwise", 2.01),
    ("float16", "none", 2.01),
])
def test_perturbation_that_is_held_wider(dtype, normalization, most):
  held, _ = perturbation_cost(5, dtype, 2, normalization)
  assert held <= most


@pytest.mark.parametrize("p", [3, math.inf])
def test_perturbation_holds_little_at_other_exponents(p):
  # One leaf of five at most, for what XLA does with the exponent.
  held, _ = perturbation_cost(5, jnp.float32, p)
  assert held <= 0.21


@pytest.mark.parametrize("method", BY_HAND)
def test_bfloat16_step_has_the_memory_of_the_one_by_hand(method):
  problem = networks.problem("mlp", 64)
  narrow = lambda x: jax.ShapeDtypeStruct(  # noqa: E731
      x.shape, jnp.bfloat16 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
  )
  params = jax.tree.map(narrow, jax.eval_shape(problem.init))
  batch = jax.tree.map(narrow, problem.batch)
  methods = steps.steps(problem.loss)
  held, by_hand = (
      timing.compiled_cost(steps.compile_step(methods[name], params, batch))[
          "temporary_bytes"
      ]
      for name in (method, BY_HAND[method])
  )
  assert held <= 1.15 * by_hand


def operations(method, leaves):
  """Of the program that XLA is given for a step with so many weight matrices."""
  matrix = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  params = {f"layer_{i}": {"kernel": matrix} for i in range(leaves)}

  def loss(params, x):
    for layer in params.values():
      x = x + jnp.tanh(x @ layer["kernel"])
    return jnp.mean(x**2)

  step = steps.steps(loss)[method]
  state = jax.eval_shape(step.init, params)
  text = jax.jit(step.step).lower(params, state, matrix).as_text()
  return len(re.findall(r"^ +(?:%|return)", text, re.M))


@pytest.mark.parametrize("method", ASAM)
def test_large_trees_give_xla_no_more_to_compile_than_by_hand(method):
  few, many = (operations(method, leaves) for leaves in (30, 90))
  by_hand = [operations(BY_HAND[method], leaves) for leaves in (30, 90)]
  assert many - few <= by_hand[1] - by_hand[0]
