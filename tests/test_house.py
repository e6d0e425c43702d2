"""The step stays readable: few functions, in few places."""

from pathlib import Path
import sys

import jax
import jax.numpy as jnp
import optax

import asam_jax

ROOT = Path(asam_jax.__file__).parent


def test_an_update_passes_few_functions_in_few_modules():
  tx = asam_jax.adaptive_sam(optax.sgd(0.1))
  params = {"kernel": jnp.ones((17, 2)), "bias": jnp.ones(2)}
  loss = lambda w: jnp.sum((w["kernel"] + w["bias"]) ** 2)  # noqa: E731
  state, grads = tx.init(params), jax.grad(loss)(params)
  passed = set()

  def note(frame, event, _):
    path = Path(frame.f_code.co_filename)
    if event == "call" and ROOT in path.parents:
      passed.add((path.name, frame.f_code.co_qualname))

  @jax.jit
  def step(grads, state, params):
    return tx.update(grads, state, params, grad_fn=jax.grad(loss))

  jax.clear_caches()  # or what another test has traced would not be passed
  sys.setprofile(note)
  try:
    step.trace(grads, state, params)
  finally:
    sys.setprofile(None)
  # Expressions with a scope of their own are no functions to hop to.
  functions = {(m, f) for m, f in passed if not f.endswith((">",))}
  assert len({module for module, _ in functions}) <= 4, functions
  assert 10 <= len(functions) <= 18, functions


def test_no_file_is_long():
  lengths = {p.name: len(p.read_text().splitlines()) for p in ROOT.rglob("*.py")}
  assert max(lengths.values()) <= 440, lengths
