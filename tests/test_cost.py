"""What a step costs, read from the compiled step: FLOPs, memory, compilations."""

import math

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
  assert 2.00 <= costs[method]["flops"] / costs["plain SGD"]["flops"] <= 2.02


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


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_second_update_does_not_compile_without_jit(p, caplog):
  tx = asam_jax.ascent(0.5, 0.01, p)
  # A shape of its own: no other test has compiled it.
  params = {"w": jnp.arange(21.0).reshape(7, 1, 3), "bias": jnp.ones(11)}
  state = tx.init(params)
  with jax.log_compiles():
    _, state = tx.update(params, state, params)
    assert "Compiling" in caplog.text
    caplog.clear()
    tx.update(params, state, params)
  assert "Compiling" not in caplog.text


@pytest.mark.parametrize("leaves", [5, 500])
def test_perturbation_alone(leaves):
  """100 M parameters: no temporary, a dozen FLOPs each."""
  tx = asam_jax.ascent(0.5, 0.01)
  leaf = jax.ShapeDtypeStruct((100_000 // leaves, 1000), jnp.float32)
  ws = [leaf] * leaves

  def perturb(ws, gs):
    return tx.update(gs, tx.init(ws), ws)[0]

  compiled = jax.jit(perturb, donate_argnums=1).lower(ws, ws).compile()
  cost = timing.compiled_cost(compiled)
  assert cost["temporary_bytes"] <= 0.005 * 4 * 100_000_000
  assert cost["flops"] <= 12.1 * 100_000_000
