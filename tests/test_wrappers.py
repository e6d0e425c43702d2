"""Optax's wrappers with adaptive_sam: one list, each row with its test.

``python -m tests.test_wrappers`` writes docs/wrappers.md from the same list.
"""

from collections.abc import Callable
import functools
import logging
import pathlib
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

pytestmark = pytest.mark.skipif(
    not hasattr(optax, "microbatching"),
    reason="the table is of an Optax that has all of these wrappers",
)
DOCS = pathlib.Path(__file__).parent.parent / "docs" / "wrappers.md"
W = {
    "bias": jnp.array([0.5, -0.3]),
    "kernel": jnp.array([[1.0, -2.0], [0.7, 1.5], [-0.4, 0.2]]),
}
X = np.asarray(jax.random.normal(jax.random.key(0), (8, 3)))
Y = np.sin(X[:, :2])
RHO, ETA = 0.3, 0.02
SGD, ADAM = optax.sgd(0.1), optax.adam(0.1)  # shared, and so is what is compiled


class Row(NamedTuple):
  """A row of the table, and the test that it is true."""

  wrapper: str
  works: str
  how: str
  test: Callable[[], None]


ROWS: list[Row] = []


def row(wrapper, works, how):
  def add(test):
    ROWS.append(Row(wrapper, works, " ".join(how.split()), test))
    return test

  return add


@jax.jit
def loss(w, x=X, y=Y):
  return jnp.mean((x @ w["kernel"] + w["bias"] - y) ** 2)


grad_fn = jax.jit(jax.grad(loss))


def perturbed(w, g=None, rho=RHO, gradient=grad_fn):
  """The gradient at w + epsilon, epsilon from the formula in NumPy."""
  g = gradient(w) if g is None else g
  ts = [
      problems.oracle_factor(w["bias"], ETA, "none"),
      problems.oracle_factor(w["kernel"], ETA, "elementwise"),
  ]
  (bias, kernel), _ = problems.oracle_perturbation([g["bias"], g["kernel"]], ts, rho, 2)
  return gradient({
      "bias": w["bias"] + np.float32(bias),
      "kernel": w["kernel"] + np.float32(kernel),
  })


def asam(base_tx, rho=RHO):
  return asam_jax.adaptive_sam(base_tx, rho, ETA)


def link(rho=RHO):
  return asam_jax.perturbed_gradient(asam_jax.ascent(rho, ETA))


def extra_args(w, batch=(X, Y)):
  value, grads = jax.value_and_grad(loss)(w, *batch)
  return {"value": value, "grad": grads, "value_fn": lambda w: loss(w, *batch)}


@functools.partial(jax.jit, static_argnames=("tx", "gradient", "value_fn_only"))
def update(tx, w, state, batch=(X, Y), *, gradient=grad_fn, value_fn_only=False):
  """A user's step with the optimizer, up to the updates."""
  extra = extra_args(w, batch)
  if not value_fn_only:
    extra["grad_fn"] = lambda w: gradient(w, *batch)
  return tx.update(extra["grad"], state, w, **extra)


@functools.partial(jax.jit, static_argnums=0)
def update_base(base_tx, w, state, h):
  """The same with the base optimizer, fed by the gradient h."""
  base_tx = optax.with_extra_args_support(base_tx)
  return base_tx.update(h, state, w, **extra_args(w))


def start(tx):
  """(W, the state), in NumPy: weak types of Optax's would be compiled for twice."""
  return jax.tree.map(np.asarray, (W, tx.init(W)))


def run(tx, steps=4, **options):
  """A user's loop with the optimizer."""
  w, state = start(tx)
  for _ in range(steps):
    updates, state = update(tx, w, state, **options)
    w = optax.apply_updates(w, updates)
  return w


@functools.cache
def written_out(base_tx, steps=4, clean_at=()):
  """The same with the base optimizer, fed by the gradient of the formula."""
  w, state = start(base_tx)
  for i in range(steps):
    h = grad_fn(w) if i in clean_at else perturbed(w)
    updates, state = update_base(base_tx, w, state, h)
    w = optax.apply_updates(w, updates)
  return w


def assert_same(got, expected):
  chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)


def assert_differ(got, expected):
  distance = max(
      np.abs(np.subtract(a, b)).max()
      for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
  )
  assert distance > 1e-3


@row("`chain`", "yes", """Links after `adaptive_sam`, or inside its `base_tx`, act on
     the descent. Links in front of it act on the ascent alone, so clipping and weight
     decay do not belong there.""")
def test_chain():
  links = (optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.1))
  base_tx = optax.chain(*links, optax.sgd(0.1, momentum=0.9))
  expected = written_out(base_tx)
  assert_same(run(asam(base_tx)), expected)
  assert_same(run(optax.chain(asam(optax.identity()), base_tx)), expected)
  assert_same(run(optax.chain(link(), base_tx)), expected)
  assert_differ(run(optax.chain(*links, asam(optax.sgd(0.1, momentum=0.9)))), expected)


@row("`named_chain`", "yes", """As `chain`:
     `named_chain(("sam", perturbed_gradient(ascent(...))), ("base", base_tx))`.""")
def test_named_chain():
  base_tx = ADAM
  tx = optax.named_chain(("sam", link()), ("base", base_tx))
  assert_same(run(tx), written_out(base_tx))
  assert tx.init(W)["sam"].ascent.count == 0


@row("`inject_hyperparams`", "yes", """`inject_hyperparams(adaptive_sam,
     static_args=("p",))`: `p` decides what is compiled. `rho` and `eta` can then be
     set in the state or be schedules, without another compilation.""")
def test_inject_hyperparams():
  make = optax.inject_hyperparams(asam_jax.adaptive_sam, static_args=("p",))
  tx = make(SGD, rho=0.1, eta=ETA)
  state = tx.init(W)
  state.hyperparams["rho"] = jnp.asarray(RHO)
  updates, _ = update(tx, W, state)
  assert_same(optax.apply_updates(W, updates), written_out(SGD, 1))


@row("`apply_if_finite`", "no: `skip_nonfinite`", """Around `adaptive_sam` it looks at
     the incoming gradient alone, and an infinite one at w + epsilon gets through.
     `skip_nonfinite(base_tx, perturbed_gradient(ascent(...)))` looks at both. Around
     an optimizer that is fed by `value_and_grad`, and around `carried`,
     `apply_if_finite` is right.""")
def test_apply_if_finite():
  spoil = lambda *args: jax.tree.map(lambda g: g * jnp.inf, grad_fn(*args))  # noqa: E731
  tx = optax.apply_if_finite(asam(SGD), 3)
  updates, _ = update(tx, W, tx.init(W), gradient=spoil)
  assert not np.isfinite(updates["kernel"]).all()
  tx = asam_jax.skip_nonfinite(SGD, link())
  updates, state = update(tx, W, tx.init(W), gradient=spoil)
  assert (np.asarray(updates["kernel"]) == 0).all()
  assert state.skipped == 1
  assert_same(run(tx), written_out(SGD))
  tx = optax.apply_if_finite(SGD, 3)
  bad_loss = lambda w: loss(w) / 0.0  # noqa: E731
  _, grads = jax.jit(asam_jax.value_and_grad(bad_loss, rho=RHO, eta=ETA))(W)
  updates, state = update_base(tx, W, tx.init(W), grads)
  assert (np.asarray(updates["kernel"]) == 0).all()
  assert state.total_notfinite == 1


@row("`conditionally_transform`", "around the link", """Around
     `perturbed_gradient(...)` it makes the steps in between plain ones with one
     gradient: `chain(conditionally_transform(perturbed_gradient(ascent(...)),
     lambda step: step % 2 == 0), base_tx)`. Around the whole `adaptive_sam` it hands
     out the gradient as an update. `sometimes` does more.""")
def test_conditionally_transform():
  even = lambda step: step % 2 == 0  # noqa: E731
  tx = optax.chain(optax.conditionally_transform(link(), even), ADAM)
  assert_same(run(tx), written_out(ADAM, clean_at=(1, 3)))
  around = optax.conditionally_transform(asam(ADAM), lambda step: step < 0)
  got, _ = update(around, W, around.init(W))
  assert_same(got, grad_fn(W))


@row("`conditionally_mask`", "yes", "Skips whole steps, around or inside.")
def test_conditionally_mask():
  odd = lambda step: step % 2 == 1  # noqa: E731
  assert_same(
      run(optax.conditionally_mask(asam(ADAM), odd), 4),
      written_out(ADAM, 2),
  )


@row("`contrib.schedule_free`", "yes", """Around or inside; the gradient is taken at
     the perturbed y. Evaluate `schedule_free_eval_params`.""")
def test_schedule_free():
  make = lambda base_tx: optax.contrib.schedule_free(base_tx, 0.1, b1=0.9)  # noqa: E731
  expected = written_out(make(SGD))
  assert_same(run(make(asam(SGD))), expected)
  assert_same(run(asam(make(SGD))), expected)


@row("`contrib.mechanize`", "inside", """`adaptive_sam(mechanize(base_tx))`. Around,
     it runs, but tunes the learning rate with the gradient at w.""")
def test_mechanize():
  mechanize = functools.partial(optax.contrib.mechanize, s_init=0.1)
  expected = written_out(mechanize(SGD), 8)
  assert_same(run(asam(mechanize(SGD)), 8), expected)
  assert_differ(run(mechanize(asam(SGD)), 8), expected)


@row("`contrib.reduce_on_plateau`", "yes", """Inside `base_tx` or after, with
     `update(..., value=loss)`.""")
def test_reduce_on_plateau():
  plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.9)
  base_tx = optax.chain(SGD, plateau)
  expected = written_out(base_tx, 6)
  assert_same(run(asam(base_tx), 6), expected)
  assert_same(run(optax.chain(asam(SGD), plateau), 6), expected)
  assert_differ(run(asam(SGD), 6), expected)


@row("`polyak_sgd`", "as base", """With `update(..., value=loss)`. The step size is that
     of the value you pass; the loss at w is at hand.""")
def test_polyak_sgd():
  base_tx = optax.polyak_sgd(max_learning_rate=0.3)
  assert_same(run(asam(base_tx)), written_out(base_tx))
  h, value = perturbed(W), loss(W)
  size = min(0.3, float(value / problems.oracle_norm(jax.tree.leaves(h), 2) ** 2))
  assert_same(run(asam(base_tx), 1), jax.tree.map(lambda w, g: w - size * g, W, h))


@row("`contrib.momo`, `momo_adam`", "as base", "With `update(..., value=loss)`.")
def test_momo():
  for base_tx in (optax.contrib.momo(0.1), optax.contrib.momo_adam(0.1)):
    assert_same(run(asam(base_tx)), written_out(base_tx))


@row("line searches", "as base", """Pass `value_fn` in place of `grad_fn` (they reject
     extra arguments that `value_fn` does not take); it serves both. Pass `value` and
     `grad` of the clean pass as well. The search makes the loss at w fall along the
     gradient at w + epsilon.""")
def test_line_searches():
  for search in (
      optax.scale_by_backtracking_linesearch(max_backtracking_steps=10),
      optax.scale_by_zoom_linesearch(max_linesearch_steps=10),
  ):
    base_tx = optax.chain(optax.sgd(1.0), search)
    got = run(asam(base_tx), 3, value_fn_only=True)
    assert_same(got, written_out(base_tx, 3))
    assert loss(got) < loss(W)
    with pytest.raises(TypeError, match="grad_fn"):
      run(asam(base_tx), 1)


@row("`lbfgs`", "as base", """Its memory is of the gradients at w + epsilon; `value`,
     `grad` and `value_fn` as for the line searches. L-BFGS needs the whole batch.""")
def test_lbfgs():
  got = run(asam(optax.lbfgs()), 3, value_fn_only=True)
  assert_same(got, written_out(optax.lbfgs(), 3))
  assert loss(got) < loss(W)


def raises_on_holes(make):
  with pytest.raises(ValueError, match=r"hole .* Use the arguments perturb and norm"):
    make(asam(SGD)).init(W)


def base_on_kernel_only(base_tx):
  freeze = {"train": base_tx, "freeze": optax.set_to_zero()}
  return optax.partition(freeze, {"bias": "freeze", "kernel": "train"})


def kernel_only():
  """What to do instead: the selection in the ascent, the wrapper in the base."""
  tx = asam_jax.adaptive_sam(
      base_on_kernel_only(SGD), RHO, ETA,
      perturb={"bias": False, "kernel": True},
  )
  g = grad_fn(W)
  t = problems.oracle_factor(W["kernel"], ETA, "elementwise")
  (epsilon,), _ = problems.oracle_perturbation([g["kernel"]], [t], RHO, 2)
  h = grad_fn(W | {"kernel": W["kernel"] + jnp.asarray(epsilon, jnp.float32)})
  assert_same(run(tx, 1), W | {"kernel": W["kernel"] - 0.1 * h["kernel"]})


@row("`masked`", "no: raises", """The norm over the unmasked leaves would be another
     method's, and `grad_fn` would get parameters with holes. Choose leaves with
     `perturb` and `normalize`; put `masked` inside, around (parts of) the base.""")
def test_masked():
  raises_on_holes(lambda tx: optax.masked(tx, {"bias": False, "kernel": True}))
  base_tx = optax.chain(
      optax.masked(optax.add_decayed_weights(0.1), {"bias": False, "kernel": True}),
      SGD,
  )
  assert_same(run(asam(base_tx)), written_out(base_tx))
  kernel_only()


@row("`partition`", "no: raises", "As `masked`; it works inside, as the base.")
def test_partition():
  raises_on_holes(base_on_kernel_only)
  base_tx = optax.partition(
      {"a": ADAM, "b": optax.sgd(0.2)}, {"bias": "a", "kernel": "b"}
  )
  assert_same(run(asam(base_tx)), written_out(base_tx))


@row("`selective_transform`", "no: raises", """As `masked`. To freeze leaves, give
     `perturb` the trained ones and freeze inside:
     `adaptive_sam(selective_transform(base_tx, freeze_mask=...), perturb=...)`.""")
def test_selective_transform():
  freeze = functools.partial(
      optax.selective_transform, freeze_mask={"bias": True, "kernel": False}
  )
  raises_on_holes(freeze)
  assert_same(run(asam(freeze(SGD))), written_out(freeze(SGD)))
  kernel_only()


@row("`flatten`", "inside", """`adaptive_sam(flatten(base_tx))`. Around, `grad_fn` gets
     one flat array, which fails, and the error says so: T and the arguments
     `perturb` and `normalize` need the leaves.""")
def test_flatten():
  base_tx = optax.flatten(ADAM)
  assert_same(run(asam(base_tx)), written_out(base_tx))
  tx = optax.flatten(asam(ADAM))
  with pytest.raises(TypeError, match=r"optax\.flatten, put it inside") as caught:
    update(tx, W, tx.init(W))
  assert any("perturb and normalize" in note for note in caught.value.__notes__)


def micro_batch(i):
  return X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


def micro_gradient(i):
  return lambda w: grad_fn(w, *micro_batch(i))


def run_accumulation(tx):
  w, state = start(tx)
  for i in range(2):
    updates, state = update(tx, w, state, micro_batch(i))
    w = optax.apply_updates(w, updates)
  return w


def step_along(gradient):
  """One step with one gradient function in both places."""
  tx = asam(SGD)
  updates, _ = jax.jit(
      lambda w: tx.update(gradient(w), tx.init(w), w, grad_fn=gradient)
  )(W)
  return optax.apply_updates(W, updates)


def mean_step(gradients):
  return jax.tree.map(lambda w, a, b: w - 0.1 * (a + b) / 2, W, *gradients)


@row("`MultiSteps` inside", "yes", """As the base:
     `adaptive_sam(MultiSteps(base_tx, k).gradient_transformation())`. One perturbation
     for each micro-batch (m-sharpness), and a step after k of them.""")
def test_multi_steps_inside():
  inner = optax.MultiSteps(SGD, 2).gradient_transformation()
  expected = mean_step([perturbed(W, gradient=micro_gradient(i)) for i in range(2)])
  assert_same(run_accumulation(asam(inner)), expected)


@row("`MultiSteps` around", "no", """Wrong: it ascends on the accumulated gradient, but
     `grad_fn` knows the last micro-batch only, and the descent is along that. Use
     one step with `grad_fn = lambda w: microbatched(jax.grad(loss), size)(w, batch)`
     or `value_and_grad(loss, accumulate=lambda f: microbatched(f, size))` for one
     perturbation from the whole batch, `MultiSteps` inside for one per micro-batch, or
     `MultiSteps(base_tx, k)` fed by `value_and_grad`.""")
def test_multi_steps_around():
  gradients = [micro_gradient(i)(W) for i in range(2)]
  g = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
  last = perturbed(W, g, gradient=lambda w: g if w is W else micro_gradient(1)(w))
  got = run_accumulation(optax.MultiSteps(asam(SGD), 2))
  assert_same(got, jax.tree.map(lambda w, h: w - 0.1 * h, W, last))  # as said: wrong
  right = jax.tree.map(lambda w, h: w - 0.1 * h, W, perturbed(W))
  assert_differ(got, right)
  accumulated = asam_jax.microbatched(jax.grad(loss), 4, argnums=(1, 2))
  assert_same(step_along(lambda w: accumulated(w, X, Y)), right)
  tx = optax.MultiSteps(SGD, 2)
  w, state = start(tx)
  ascending = jax.jit(asam_jax.grad(loss, rho=RHO, eta=ETA))
  for i in range(2):
    updates, state = update_base(tx, w, state, ascending(w, *micro_batch(i)))
    w = optax.apply_updates(w, updates)
  per_micro_batch = [perturbed(W, gradient=micro_gradient(i)) for i in range(2)]
  assert_same(w, mean_step(per_micro_batch))


@row("`lookahead`", "with `value_and_grad`", """It takes no extra arguments, so no
     `grad_fn`: a TypeError. Feed it: `lookahead(base_tx, ...)` with
     `asam_jax.value_and_grad(loss)(params.fast)`.""")
def test_lookahead():
  logging.getLogger("absl").setLevel(logging.ERROR)
  params = optax.LookaheadParams.init_synced(W)
  tx = optax.lookahead(asam(SGD), 2, 0.5)
  with pytest.raises(TypeError, match="grad_fn"):
    tx.update(grad_fn(W), tx.init(params), params, grad_fn=grad_fn)
  tx = optax.lookahead(SGD, 2, 0.5)
  state, fast = tx.init(params), W

  @jax.jit
  def step(params, state):
    _, grads = asam_jax.value_and_grad(loss, rho=RHO, eta=ETA)(params.fast)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(2):
    params, state = step(params, state)
    fast = jax.tree.map(lambda w, h: w - 0.1 * h, fast, perturbed(fast))
  slow = jax.tree.map(lambda a, b: a + 0.5 * (b - a), W, fast)
  assert_same(params.fast, slow)
  assert_same(params.slow, slow)


@row("`contrib.sam`", "our ascent in it", """Its adversary's updates are subtracted:
     `contrib.sam(base_tx, chain(ascent(...), scale(-1.0)), opaque_mode=True)`, with
     `grad_fn(params, i)`. Its `reset_state=True` holds schedules of rho at their first
     value. `adaptive_sam` has neither trap.""")
def test_contrib_sam():
  adversary = optax.chain(asam_jax.ascent(RHO, ETA), optax.scale(-1.0))
  tx = optax.contrib.sam(SGD, adversary, opaque_mode=True)
  w, state = start(tx)

  @jax.jit
  def opaque(w, state):
    return tx.update(grad_fn(w), state, w, grad_fn=lambda w, i: grad_fn(w))

  for _ in range(3):
    updates, state = opaque(w, state)
    w = optax.apply_updates(w, updates)
  assert_same(w, written_out(SGD, 3))
  # And in its other mode, in two calls a step.
  tx = optax.contrib.sam(SGD, adversary)
  w, state = start(tx)
  transparent = jax.jit(tx.update)
  for _ in range(6):
    updates, state = transparent(grad_fn(w), state, w)
    w = optax.apply_updates(w, updates)
  assert_same(w, written_out(SGD, 3))


@row("`microbatching.microbatch`", "yes", """Around `grad_fn` and the incoming gradient,
     as `accumulate` of `value_and_grad` (one perturbation for the batch), or around
     `asam_jax.value_and_grad(loss)` (one per microbatch), with the accumulator
     `AccumulationType.MEAN`. `asam_jax.microbatched` takes its place with older Optax
     versions, adds up in float32, and takes integer results.""")
def test_microbatching():
  gradient = optax.microbatching.microbatch(
      jax.grad(loss), (1, 2), 4, optax.microbatching.AccumulationType.MEAN
  )
  assert_same(step_along(lambda w: gradient(w, X, Y)), written_out(SGD, 1))


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.test.__name__[5:])
def test_row_says_something(case):
  # pytest runs the tests themselves, by their names; here: each is in the table.
  assert globals()[case.test.__name__] is case.test
  assert case.how.endswith(".")


def test_the_steps_are_not_trivial():
  assert_differ(written_out(SGD), written_out(SGD, clean_at=range(4)))
  np.testing.assert_array_less(0, float(loss(W)))


def document():
  lines = [
      "# Optax's wrappers and adaptive_sam",
      "",
      "What works around, inside and beside `asam_jax.adaptive_sam(base_tx, ...)` (and",
      "`sam`, which is the same), and what to do where it does not. Each row is a test",
      "in `tests/test_wrappers.py` that compares with the equations written out.",
      "Written by `python -m tests.test_wrappers`; do not edit.",
      "",
      "| wrapper | works | how |",
      "|---|---|---|",
      *(f"| {case.wrapper} | {case.works} | {case.how} |" for case in ROWS),
  ]
  return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_this_list():
  assert DOCS.read_text(encoding="utf-8") == document(), (
      "run python -m tests.test_wrappers"
  )


if __name__ == "__main__":
  DOCS.write_text(document(), encoding="utf-8")
