"""The page on many devices: its code runs, and gives what the page says it does."""

from pathlib import Path
import re

import chex
import jax
import numpy as np
import pytest

import asam_jax
from tests import devices
from tests.devices import Spec

PAGE = (Path(__file__).parent.parent / "docs" / "many_devices.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
pytestmark = pytest.mark.skipif(
    not devices.HAS_EXPLICIT, reason=f"the page is for newer JAX; {devices.NO_EXPLICIT}"
)


@pytest.fixture(scope="module")
def page():
  """The names that the page's code leaves, one block after the other."""
  assert len(CODE) > 10
  names = {}
  for number, code in enumerate(CODE):
    exec(compile(code, f"many_devices.md, block {number}", "exec"), names)
  return names


def close(got, expected):
  chex.assert_trees_all_close(
      jax.device_get(got), jax.device_get(expected), rtol=1e-5, atol=2e-6
  )


@pytest.mark.parametrize(
    "name", ["data_parallel", "data_parallel_explicit", "fsdp", "data_tensor"]
)
def test_layouts(page, name):
  close(page[name], page["one_device"])


def test_the_step_is_compiled_once(page):
  assert page["compiled_once"]._cache_size() == 1


def test_an_ascent_for_each_device_or_four_rows(page):
  fun = jax.jit(asam_jax.value_and_grad(page["loss"], rho=0.5))

  def mean_over(pieces):
    results = [fun(page["start"], piece) for piece in pieces]
    return jax.tree.map(lambda *xs: np.mean(np.array(xs), 0), *results)

  rows = [jax.tree.map(lambda x, i=i: x[8 * i : 8 * i + 8], page["examples"])
          for i in range(8)]
  close((page["value"], page["grads"]), mean_over(rows))
  # The first step of momentum is that of SGD.
  descended = jax.tree.map(lambda w, g: w - 0.1 * g, page["start"], page["grads"])
  close(page["stepped"], descended)
  halves = [jax.tree.map(lambda x, i=i: x[i::2], each) for each in rows
            for i in range(2)]
  close((page["value_m4"], page["grads_m4"]), mean_over(halves))
  fours = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], each) for each in rows
           for i in range(2)]
  close((page["value_m"], page["grads_m"]), mean_over(fours))


@pytest.mark.parametrize(
    ("name", "times"),
    [("per_device", 1), ("per_four_rows", 1), ("accumulated_by_hand", 2)],
)
def test_exchanges_by_hand(page, name, times):
  mapped = jax.shard_map(
      page[name], mesh=page["mesh"], in_specs=(Spec(), Spec("data")), out_specs=Spec()
  )
  compiled = jax.jit(mapped).lower(page["params"], page["batch"]).compile()
  found = devices.exchanges(compiled)
  sizes = [w.size for w in page["start"].values()]
  assert found.arrays == {("all-reduce", size): times for size in sizes}
  assert found.scalars <= 1  # the loss
  # None stands in a loop.
  entry = compiled.as_text().split("\nENTRY ")[1]
  assert entry.count(" all-reduce(") == compiled.as_text().count(" all-reduce(")


def test_exchanges_of_one_integer(page):
  fun = asam_jax.value_and_grad(page["loss"], rho=0.5, m_sharpness=4)
  compiled = jax.jit(fun).lower(page["params"], page["batch"]).compile()
  found = devices.exchanges(compiled)
  assert found.arrays == {
      ("all-reduce", w.size): 1 for w in page["start"].values()
  }
  assert found.scalars <= 2  # the loss among them


@pytest.mark.parametrize("suffix", ["jit", "map", "tensor"])
def test_one_perturbation_for_the_batch(page, suffix):
  expected = asam_jax.value_and_grad(page["loss"], rho=0.5)(
      page["start"], page["examples"])
  close((page[f"value_{suffix}"], page[f"grads_{suffix}"]), expected)


@pytest.mark.parametrize("suffix", ["w", "p", "s"])
def test_weights(page, suffix):
  real = jax.tree.map(lambda x: x[:40], page["examples"])
  expected = asam_jax.value_and_grad(page["loss"], rho=0.5)(page["start"], real)
  close((page[f"value_{suffix}"], page[f"grads_{suffix}"]), expected)


def test_weights_with_a_perturbation_for_each_group(page):
  """The page's groups of 8 are real or padding as a whole."""
  fun = jax.jit(asam_jax.value_and_grad(page["loss"], rho=0.5))
  rows = [jax.tree.map(lambda x, i=i: x[i : i + 8], page["examples"])
          for i in range(0, 40, 8)]
  results = [fun(page["start"], each) for each in rows]
  expected = jax.tree.map(lambda *xs: np.mean(np.array(xs), 0), *results)
  close((page["value_g"], page["grads_g"]), expected)


def test_links():
  for link in re.findall(r"\]\(([^)#:]+)\)", PAGE):
    assert (Path(__file__).parent.parent / "docs" / link).exists()
