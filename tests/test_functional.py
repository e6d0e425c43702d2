"""Functional SAM against NumPy, in closed form, and what its door promises."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

RNG = np.random.default_rng(0)
W = {
    "hidden": {"kernel": RNG.normal(size=(3, 5)), "bias": RNG.normal(size=5)},
    "out": {"kernel": RNG.normal(size=(5, 4)), "bias": RNG.normal(size=4)},
}
X = RNG.normal(size=(8, 3))
Y = RNG.integers(0, 4, size=8)


def single(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


W32, BATCH = single(W), (jnp.asarray(X, jnp.float32), jnp.asarray(Y))


def model(w, batch):
  x, _ = batch
  hidden = jnp.tanh(x @ w["hidden"]["kernel"] + w["hidden"]["bias"])
  return hidden @ w["out"]["kernel"] + w["out"]["bias"]


def loss(logits, batch):
  _, y = batch
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def whole(w, batch):
  return loss(model(w, batch), batch)


# The equations, written out in NumPy.


def forward(w):
  hidden = np.tanh(X @ w["hidden"]["kernel"] + w["hidden"]["bias"])
  return hidden, hidden @ w["out"]["kernel"] + w["out"]["bias"]


def derivative(w):
  """Of the mean cross entropy, with respect to the logits."""
  _, logits = forward(w)
  shares = np.exp(logits - logits.max(1, keepdims=True))
  shares /= shares.sum(1, keepdims=True)
  return (shares - np.eye(4)[Y]) / len(X)


def pulled_back(w, cotangent):
  """The transposed Jacobian of the logits at w, times the cotangent."""
  hidden, _ = forward(w)
  before = (cotangent @ w["out"]["kernel"].T) * (1 - hidden**2)
  return {
      "hidden": {"kernel": X.T @ before, "bias": before.sum(0)},
      "out": {"kernel": hidden.T @ cotangent, "bias": cotangent.sum(0)},
  }


def oracle(w, rho, eta=0.01, p=2.0, operator="elementwise"):
  pairs, form = jax.tree_util.tree_flatten_with_path(w)
  factors = [
      problems.oracle_factor(
          x, eta, "none" if "bias" in jax.tree_util.keystr(path) else operator)
      for path, x in pairs
  ]
  grads = jax.tree.leaves(pulled_back(w, derivative(w)))
  epsilon, _ = problems.oracle_perturbation(grads, factors, rho, p)
  point = jax.tree.map(np.add, w, jax.tree.unflatten(form, epsilon))
  return pulled_back(point, derivative(w))


@pytest.mark.parametrize("options", [
    {}, {"p": 1}, {"p": 3}, {"p": np.inf}, {"normalization": "none"},
    {"normalization": "layerwise", "eta": 0.1},
], ids=str)
def test_against_numpy(options):
  fun = asam_jax.functional_value_and_grad(model, loss, rho=0.4, **options)
  names = {"normalization": "operator"}
  expected = oracle(W, 0.4, **{names.get(k, k): v for k, v in options.items()})
  with problems.enable_x64(True):
    value, grads = jax.jit(fun)(
        jax.tree.map(jnp.asarray, W), (jnp.asarray(X), jnp.asarray(Y)))
    chex.assert_trees_all_close(grads, expected, rtol=1e-9)
  _, logits = forward(W)
  chosen = logits[np.arange(8), Y]
  np.testing.assert_allclose(
      value, np.mean(np.log(np.exp(logits).sum(1)) - chosen), rtol=1e-6)


def test_training_against_numpy():
  w = W
  for _ in range(10):
    w = jax.tree.map(lambda x, g: x - 0.3 * g, w, oracle(w, 0.4))
  with problems.enable_x64(True):
    fun = asam_jax.functional_value_and_grad(model, loss, rho=0.4)
    batch = jnp.asarray(X), jnp.asarray(Y)

    @jax.jit
    def step(got, state):
      updates, state = optax.sgd(0.3).update(fun(got, batch)[1], state, got)
      return optax.apply_updates(got, updates), state

    got = jax.tree.map(jnp.asarray, W)
    state = optax.sgd(0.3).init(got)
    for _ in range(10):
      got, state = step(got, state)
    assert step._cache_size() == 1
    chex.assert_trees_all_close(got, w, rtol=1e-9)


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_rho_zero_is_the_plain_gradient_bit_for_bit(compiled):
  fun = asam_jax.functional_value_and_grad(model, loss, rho=0.0)
  plain = jax.value_and_grad(whole)
  if compiled:
    fun, plain = jax.jit(fun), jax.jit(plain)
  chex.assert_trees_all_equal(fun(W32, BATCH), plain(W32, BATCH))


def test_closed_form_of_a_square():
  # Of f = w^2 with (f - y)^2 / 2: 2 (w + rho w) (w^2 - y), at eta = 0 and w > 0.
  fun = asam_jax.functional_value_and_grad(
      lambda w, y: w**2, lambda f, y: (f - y) ** 2 / 2, rho=0.3, eta=0.0)
  for w in (1.7, 2.0, 3.0):
    _, got = fun(jnp.array(w), jnp.array(1.0))
    assert float(got) == pytest.approx(2 * w * 1.3 * (w**2 - 1), rel=1e-5)
    ours = asam_jax.grad(lambda w: (w**2 - 1) ** 2 / 2, rho=0.3, eta=0.0)(jnp.array(w))
    assert float(ours) == pytest.approx(2 * w * 1.3 * ((1.3 * w) ** 2 - 1), rel=1e-5)


def test_of_a_linear_model_it_is_the_plain_gradient():
  x, y = jnp.asarray(X, jnp.float32), jnp.asarray(X[:, 0], jnp.float32)
  squared = lambda outputs, x: jnp.mean((outputs - y) ** 2)  # noqa: E731
  w = jnp.array([1.0, -2.0, 0.5])
  fun = asam_jax.functional_value_and_grad(lambda w, x: x @ w, squared, rho=2.0)
  chex.assert_trees_all_close(
      fun(w, x)[1], jax.grad(lambda w: squared(x @ w, x))(w), rtol=1e-6)


def test_the_loss_itself_as_the_output_is_asam():
  fun = asam_jax.functional_value_and_grad(
      whole, lambda value, batch: value, rho=0.4, with_info=True)
  expected = asam_jax.value_and_grad(whole, rho=0.4, with_info=True)(W32, BATCH)
  chex.assert_trees_all_close(fun(W32, BATCH), expected, rtol=2e-5, atol=1e-7)


def test_info():
  fun = asam_jax.functional_value_and_grad(model, loss, rho=0.4, with_info=True)
  value, grads, info = jax.jit(fun)(W32, BATCH)
  _, _, expected = asam_jax.value_and_grad(whole, rho=0.4, with_info=True)(W32, BATCH)
  # The losses are those of both points, as SAM's are; the angle is of what comes out.
  others = {"cosine": expected.cosine}
  chex.assert_trees_all_close(
      info._replace(**others), expected._replace(**others), rtol=1e-4, atol=1e-6)
  flat = lambda tree: np.concatenate(  # noqa: E731
      [np.float64(x).ravel() for x in jax.tree.leaves(tree)])
  g, h = flat(jax.grad(whole)(W32, BATCH)), flat(grads)
  np.testing.assert_allclose(
      info.cosine, g @ h / np.linalg.norm(g) / np.linalg.norm(h), rtol=1e-4)
  assert abs(info.cosine - expected.cosine) > 1e-4
  assert value == info.value


def test_aux_is_of_the_clean_pass_and_keywords_go_to_the_model():
  def with_aux(w, batch, scale):
    logits = scale * model(w, batch)
    return logits, {"mean": jnp.mean(logits), "rows": jnp.array(8)}

  fun = asam_jax.functional_value_and_grad(with_aux, loss, has_aux=True, rho=0.4)
  (value, aux), grads = jax.jit(fun)(W32, BATCH, scale=2.0)
  twice = lambda w, batch: 2.0 * model(w, batch)  # noqa: E731
  expected = asam_jax.functional_value_and_grad(twice, loss, rho=0.4)(W32, BATCH)
  chex.assert_trees_all_close((value, grads), expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(aux["mean"], jnp.mean(twice(W32, BATCH)), rtol=1e-5)
  assert aux["rows"] == 8


def test_argnums_and_what_the_loss_is_given():
  def parted(batch, out, hidden):
    return model({"hidden": hidden, "out": out}, batch)

  fun = asam_jax.functional_value_and_grad(parted, loss, (1, -1), rho=0.4)
  value, (out, hidden) = fun(BATCH, W32["out"], W32["hidden"])
  expected = asam_jax.functional_value_and_grad(model, loss, rho=0.4)(W32, BATCH)
  chex.assert_trees_all_close(
      (value, {"hidden": hidden, "out": out}), expected, rtol=1e-5, atol=1e-7)


def test_accumulate_is_the_whole_batch():
  expected = asam_jax.functional_value_and_grad(
      model, loss, rho=0.4, with_info=True)(W32, BATCH)
  for argnums, accumulate in (
      (0, 2), (-2, 2), (0, lambda fun: asam_jax.microbatched(fun, 4))):
    fun = asam_jax.functional_value_and_grad(
        model, loss, argnums, rho=0.4, accumulate=accumulate, with_info=True)
    chex.assert_trees_all_close(
        jax.jit(fun)(W32, BATCH), expected, rtol=2e-4, atol=1e-6)


def test_microbatches_each_with_their_perturbation():
  fun = asam_jax.functional_value_and_grad(model, loss, rho=0.4)
  got = asam_jax.microbatched(fun, 4)(W32, BATCH)
  halves = [fun(W32, jax.tree.map(lambda x, i=i: x[i::2], BATCH)) for i in range(2)]
  expected = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("average_ascent", [False, True])
def test_devices(average_ascent):
  fun = asam_jax.functional_value_and_grad(
      model, loss, rho=0.4, axis_name="data", average_ascent=average_ascent)
  shares = jax.tree.map(lambda x: jnp.reshape(x, (4, 2, *x.shape[1:])), BATCH)
  _, got = jax.vmap(fun, in_axes=(None, 0), axis_name="data")(W32, shares)
  for i in range(1, 4):
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x, i=i: x[i], got), jax.tree.map(lambda x: x[0], got))
  alone = asam_jax.functional_value_and_grad(model, loss, rho=0.4)
  each = [alone(W32, jax.tree.map(lambda x, i=i: x[i], shares)) for i in range(4)]
  expected = (
      alone(W32, BATCH) if average_ascent
      else jax.tree.map(lambda *xs: sum(xs) / 4, *each)
  )[1]
  chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[0], got), expected, rtol=1e-4, atol=1e-6)


def test_sharded_is_unsharded():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  fun = jax.jit(asam_jax.functional_value_and_grad(model, loss, rho=0.4))
  chex.assert_trees_all_close(
      fun(W32, jax.device_put(BATCH, spread)), fun(W32, BATCH), rtol=1e-5, atol=1e-6)


def test_an_ascent_chain_sees_the_gradients_of_the_whole_loss():
  chain = asam_jax.iterated(asam_jax.ascent(0.4), 3)
  fun = asam_jax.functional_value_and_grad(model, loss, ascent=chain)
  gradient = lambda w: jax.grad(whole)(w, BATCH)  # noqa: E731
  epsilon, _ = chain.update(gradient(W32), chain.init(W32), W32, grad_fn=gradient)
  kept = jax.grad(loss)(model(W32, BATCH), BATCH)
  _, pull = jax.vjp(
      lambda w: model(w, BATCH), jax.tree.map(jnp.add, W32, epsilon))
  chex.assert_trees_all_close(fun(W32, BATCH)[1], pull(kept)[0], rtol=1e-4, atol=1e-6)


def test_under_scan_vmap_and_a_second_derivative():
  fun = asam_jax.functional_value_and_grad(model, loss, rho=0.4)
  _, expected = fun(W32, BATCH)
  twice = jax.tree.map(lambda x: jnp.stack([x, x]), W32)
  _, mapped = jax.jit(jax.vmap(fun, in_axes=(0, None)))(twice, BATCH)
  chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[1], mapped), expected, rtol=1e-5, atol=1e-6)
  body = lambda w, _: (w, fun(w, BATCH)[1])  # noqa: E731
  _, scanned = jax.jit(lambda w: jax.lax.scan(body, w, length=2))(W32)
  chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[1], scanned), expected, rtol=1e-5, atol=1e-6)

  with problems.enable_x64(True):
    batch = jnp.asarray(X), jnp.asarray(Y)
    size = lambda w: sum(  # noqa: E731
        jnp.sum(g**2) for g in jax.tree.leaves(fun(w, batch)[1]))
    w = jax.tree.map(jnp.asarray, W)
    slope = jax.grad(size)(w)["out"]["kernel"][1, 2]
    h = 1e-6

    def moved(step):
      kernel = w["out"]["kernel"].at[1, 2].add(step)
      return size(w | {"out": w["out"] | {"kernel": kernel}})

    np.testing.assert_allclose(slope, (moved(h) - moved(-h)) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_keeps_its_dtype(dtype):
  narrow = jax.tree.map(lambda x: x.astype(dtype), W32)
  fun = asam_jax.functional_value_and_grad(model, loss, rho=0.4)
  _, grads = jax.jit(fun)(narrow, (BATCH[0].astype(dtype), BATCH[1]))
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, narrow)
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_nan_is_not_hidden_and_zero_gradients_are_finite():
  fun = asam_jax.functional_value_and_grad(model, loss, rho=0.4)
  _, grads = fun(W32, (BATCH[0].at[0, 0].set(jnp.nan), BATCH[1]))
  assert np.isnan(grads["hidden"]["kernel"]).all()
  none = asam_jax.functional_value_and_grad(
      model, lambda logits, batch: 0.0 * jnp.sum(logits), rho=0.4)
  assert all((g == 0).all() for g in jax.tree.leaves(none(W32, BATCH)[1]))


def test_the_cost_is_two_gradients():
  wide = {"hidden": {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)},
          "out": {"kernel": jnp.ones((256, 128)), "bias": jnp.ones(128)}}
  batch = jnp.ones((256, 64)), jnp.zeros(256, int)

  def flops(fun):
    analysis = jax.jit(fun).lower(wide, batch).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

  asam = flops(asam_jax.value_and_grad(whole))
  assert flops(asam_jax.functional_value_and_grad(model, loss)) <= 1.001 * asam


@pytest.mark.parametrize(("options", "arguments", "message"), [
    ({"model": lambda w, batch: jnp.argmax(model(w, batch), 1)}, {},
     r"model\(\.\.\.\) has dtype int32; .* has_aux=True"),
    ({"model": lambda w, batch: {"logits": model(w, batch), "name": "a"}}, {},
     r"model\(\.\.\.\)\['name'\] has str"),
    ({"model": lambda w, batch: ()}, {}, r"model\(\.\.\.\) returned \(\)"),
    ({}, {"has_aux": True}, r"model\(\.\.\.\) returned a .*\(outputs, aux\)"),
    ({"loss": lambda logits, batch: logits}, {}, r"loss\(outputs, \.\.\.\) returned"),
    ({"model": 3}, {}, "model=3 must be a function"),
    ({"loss": None}, {}, "loss=None must be a function"),
    ({}, {"rho": lambda step: 0.1}, "rho=.* is a schedule"),
    ({}, {"accumulate": 0}, "accumulate=0"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_errors(options, arguments, message):
  functions = {"model": model, "loss": loss} | options
  with pytest.raises((TypeError, ValueError), match=message):
    asam_jax.functional_value_and_grad(**functions, **arguments)(W32, BATCH)


def test_it_is_not_asam_twice():
  fun = asam_jax.functional_value_and_grad(model, loss)
  tx = asam_jax.adaptive_sam(optax.sgd(0.1))
  with pytest.raises(ValueError, match="ASAM twice"):
    tx.update(fun(W32, BATCH)[1], tx.init(W32), W32,
              grad_fn=functools.partial(jax.grad(whole), batch=BATCH))
