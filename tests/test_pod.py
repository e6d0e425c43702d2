"""What a compiled step costs is read rightly; the pod's compiler, where it is there."""

import collections
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

pytest.importorskip("flax", reason="the networks need the extra 'examples'")

from benchmarks.pod import compiler
from benchmarks.pod import methods
from benchmarks.pod import networks
from benchmarks.pod import program
from benchmarks.pod import report
from benchmarks.pod import transformer

ROOT = pathlib.Path(__file__).parent.parent
MISSING = compiler.missing()


@pytest.fixture(scope="module")
def mesh():
  return Mesh(np.array(jax.devices()[:4]), (compiler.AXIS,))


def compiled(function, mesh, spec, *shapes):
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for s in shapes]
  return jax.jit(function).lower(*arrays).compile()


def test_all_reduce_of_a_sum(mesh):
  result = compiled(lambda x: jnp.sum(x, 0), mesh, [compiler.AXIS], (8, 24))
  (found,) = program.cost(result).collectives
  assert found == program.Collective("all-reduce", 24 * 4, 4)


def test_all_gather_counts_the_whole(mesh):
  everywhere = NamedSharding(mesh, PartitionSpec())
  result = compiled(
      lambda x: lax.with_sharding_constraint(x, everywhere) + 1,
      mesh,
      [compiler.AXIS],
      (8, 24),
  )
  (found,) = program.cost(result).collectives
  assert found == program.Collective("all-gather", 8 * 24 * 4, 4)


def test_loops_and_branches_are_counted(mesh):
  def function(x):
    x = lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: 2 * x, x)
    return lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)

  cost = program.cost(compiled(function, mesh, [], (8,)))
  assert cost.loops == {"while": 1, "conditional": 1}
  assert cost.collectives == ()


def test_flops_and_bytes_are_one_device_s(mesh):
  result = compiled(lambda x: x @ x.T, mesh, [], (16, 32))
  cost = program.cost(result)
  assert cost.flops == pytest.approx(2 * 16 * 16 * 32, rel=0.01)
  assert cost.bytes_accessed >= 4 * (16 * 32 + 16 * 16)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]{1,0:T(8,128)}", 24),
        ("(bf16[4]{0}, /*index=5*/s32[], pred[3])", 15),
        ("f8e4m3fn[10]", 10),
        ("s4[3]", 2),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
  assert program.array_bytes(shape) == size


# As the compiler of a TPU writes them: one exchange spread over two fusions, a
# reduce-scatter as a fusion, a pair of start and done.
TPU_PROGRAM = """
%async_collective_fusion.1 (param_0: bf16[512,64]) -> bf16[2048,64] {
  %param_0 = bf16[512,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[2048,64]{1,0:T(8,128)(2,1)} all-gather(%param_0), \
channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
}
%async_collective_fusion.2 (param_1: bf16[512,64]) -> bf16[2048,64] {
  %param_1 = bf16[512,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[2048,64]{1,0:T(8,128)(2,1)} all-gather(%param_1), \
channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
}
%all-reduce-scatter.3 (input: f32[8,16]) -> f32[2,16] {
  %input = f32[8,16]{1,0} parameter(0)
  %all-reduce.7 = f32[8,16]{1,0} all-reduce(%input), channel_id=5, \
replica_groups={{0,1,2,3}}, to_apply=%add
}
ENTRY %main (p: f32[4]) -> f32[16] {
  %p = f32[4]{0} parameter(0)
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), channel_id=6, \
replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %done = f32[16]{0} all-gather-done(%start)
}
"""


def test_exchanges_as_a_tpu_writes_them():
  assert program.collectives(TPU_PROGRAM) == (
      program.Collective("all-gather", 2 * 2048 * 64, 4),
      program.Collective("reduce-scatter", 4 * 8 * 16, 4),
      program.Collective("all-gather", 4 * 16, 4),
  )


def test_placement_is_along_the_first_axis_that_divides(mesh):
  shapes = {"matrix": (6, 8), "both": (8, 8), "neither": (3, 5), "vector": (8,)}
  tree = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  placed = compiler.placed(tree, mesh, sharded=True)
  specs = {name: tuple(leaf.sharding.spec) for name, leaf in placed.items()}
  assert specs["matrix"] == (None, compiler.AXIS)
  assert specs["both"] == (compiler.AXIS, None)
  assert not any(specs["neither"])
  assert not any(specs["vector"])
  assert compiler.bytes_per_device(placed) == 4 * (12 + 16 + 15 + 8)


def test_networks_are_what_they_are_called():
  def parameters(problem):
    return sum(w.size for w in jax.tree.leaves(jax.eval_shape(problem.init)))

  assert parameters(networks.resnet()) == 25_557_032  # torchvision's ResNet-50 too
  assert parameters(transformer.transformer()) == pytest.approx(1.04e9, rel=0.01)
  for scanned in (False, True):
    small = transformer.transformer(2, scanned, width=64, heads=4, vocabulary=50)
    params = jax.eval_shape(small.init)
    assert jax.eval_shape(small.loss, params, small.batch(3)).shape == ()


def row(method, **changes):
  numbers = {"flops": 100.0, "bytes_accessed": 100.0, "temporary_bytes": 10**9}
  by_hand = {"by hand": None}.get(method, "by hand")
  base = {"part": "mlp", "chips": 4, "method": method, "by_hand": by_hand}
  base |= {"layers": 2, "collectives": {"all-reduce": [8, 4]}, "parameters": 10}
  base |= {"parameter_bytes": 40, "while": 0, "conditional": 0, "peak_bytes": 0}
  return base | numbers | changes


def test_what_the_library_may_take():
  by_hand = row("by hand")
  assert report.violations([by_hand, row("sam", flops=102.9)]) == []
  worse = {
      "flops": 103.1,
      "bytes_accessed": 105.1,
      "temporary_bytes": 1.06e9,
      "while": 1,
      "collectives": {"all-reduce": [8, 4], "all-gather": [4]},
  }
  for name, value in worse.items():
    (found,) = report.violations([by_hand, row("sam", **{name: value})])
    assert "mlp, 4 chips, sam:" in found
  # What is not ours may take what it wants.
  assert report.violations([by_hand, row("optax.contrib.sam", flops=200.0)]) == []


def kept():
  """The rows of all compiled steps that are kept, by (part, chips, method)."""
  lines = [line for path in (ROOT / "results" / "pod").glob("*.jsonl")
           for line in path.read_text().splitlines()]
  rows = [each for each in map(json.loads, lines) if "method" in each]
  # The unrolled transformer is of fewer layers, for the model of scale.
  rows = [each for each in rows if each.get("scanned", True)]
  by_name = {(each["part"], each["chips"], each["method"]): each for each in rows}
  assert len(by_name) == len(rows)
  return by_name


def test_what_is_kept_takes_no_more():
  rows = kept()
  of_slice = lambda *key: {m for *which, m in rows if which == list(key)}  # noqa: E731
  every = of_slice("mlp", 4)
  assert len(every) == 11
  assert of_slice("resnet", 4) == every
  for chips in (4, 16, 64, 256):
    assert of_slice("mlp", chips) == every
    whole = {method for method in every if "per device" not in method}
    assert of_slice("transformer", chips) == whole
  assert report.violations(list(rows.values())) == []


@pytest.mark.parametrize(
    ("head", "rows_of_it"),
    [("| Network, and examples a chip |", 21), ("| Over SGD's |", 16)],
)
def test_the_page_has_what_is_kept(head, rows_of_it):
  page = (ROOT / "docs" / "many_devices.md").read_text()
  lines = page.split(head)[1].split("\n\n")[0].splitlines()[2:]
  assert len(lines) == rows_of_it
  rows, above = kept(), ["", ""]
  for line in lines:
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    above = [cell or old for cell, old in zip(cells[:2], above, strict=True)]
    part = re.split(r"\W", above[0])[0].lower()
    method = cells[2].replace("`", "").replace(", an ascent", ",")
    for chips in map(int, above[1].split(", ")):
      found = rows[part, chips, method]
      base = rows[part, chips, "SGD" if "SGD" in head else found["by_hand"]]
      names = ["flops", "bytes_accessed", "temporary_bytes"]
      ratios = [f"{found[name] / base[name]:.3f}" for name in names]
      sums = [sum(map(len, one["collectives"].values())) for one in (found, base)]
      assert [*ratios, "{} and {}".format(*sums)] == cells[3:], (part, chips, method)


def test_looksam_exchanges_a_scalar_or_two_more():
  rows = kept()
  for part, chips, method in rows:
    if method.startswith("LookSAM"):
      base = "adaptive_sam" if "fifth" in method else "SGD"
      exchanged, of_base = (
          collections.Counter(
              (kind, size) for kind, sizes in rows[key]["collectives"].items()
              for size in sizes)
          for key in ((part, chips, method), (part, chips, base))
      )
      assert all(size <= 8 for _, size in exchanged - of_base)
      assert not of_base - exchanged


def test_a_copy_on_every_chip_makes_the_program_the_same_for_all_sizes():
  rows = kept()
  others = [key for key in rows if key[0] == "resnet" and key[1] != 4]
  assert {chips for _, chips, _ in others} == {16, 256}
  for part, chips, method in others:
    few, many = rows[part, 4, method], rows[part, chips, method]
    for name in ("flops", "collectives"):
      assert few[name] == many[name]
    for name in ("bytes_accessed", "temporary_bytes"):
      assert few[name] == pytest.approx(many[name], rel=0.003 if chips > 16 else 0)


def test_extrapolation_is_along_a_line():
  fewer, more = row("sam"), row("sam", layers=4, flops=160.0)
  more["collectives"] = {"all-reduce": [8, 8, 4]}
  whole = report.extrapolated(fewer, more, 18)
  assert whole["flops"] == 160 + 7 * 60
  assert sum(whole["collectives"]["all-reduce"]) == 20 + 7 * 8
  assert whole["temporary_bytes"] is None
  assert whole["extrapolated_from"] == [2, 4]


def test_methods_make_the_step_of_their_hand_written_ones(mesh):
  def loss(params, batch):
    return jnp.mean((batch @ params["kernel"] + params["bias"]) ** 2)

  rng = np.random.default_rng(0)
  params = {"kernel": np.float32(rng.normal(size=5)), "bias": np.float32(0.5)}
  batch = np.float32(rng.normal(size=(8, 5)))
  results = {}
  for name, method in methods.methods(loss, mesh).items():
    results[name] = jax.jit(method.step)(params, method.init(params), batch)[0]
  plain = results["SGD"]["kernel"]
  for name, method in methods.methods(loss, mesh).items():
    if method.by_hand:
      got, expected = results[name]["kernel"], results[method.by_hand]["kernel"]
      np.testing.assert_allclose(got, expected, rtol=1e-5)
      assert np.abs(expected - plain).max() > 1e-4


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_compiled_for_a_pod(tmp_path):
  """In a process of its own: libtpu must not be in the suite's."""
  results = tmp_path / "pod.jsonl"
  command = [sys.executable, "-m", "benchmarks.pod", "--parts", "mlp", "--chips", "4"]
  names = ["SGD", "ASAM by hand", "adaptive_sam", "SAM by hand", "sam"]
  command += ["--methods", *names, "momentum_sam", "--results", str(results)]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  run = subprocess.run(
      command, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert run.returncode == 0, run.stderr
  header, *rows = [json.loads(line) for line in results.read_text().splitlines()]
  assert "libtpu" in header
  by_name = {row["method"]: row for row in rows}
  assert report.violations(rows) == [], run.stdout
  sgd = by_name["SGD"]
  layers, width, batch = 12, 1024, 512
  # Each layer's three products, but for the gradient of the input.
  assert sgd["flops"] == pytest.approx(
      2 * batch * width**2 * (3 * layers - 1), rel=0.01
  )
  (exchanged,) = sgd["collectives"]["all-reduce"]
  assert exchanged == pytest.approx(4 * layers * (width**2 + width), rel=0.01)
  for name in names[1:]:
    assert len(by_name[name]["collectives"]["all-reduce"]) == 2
    assert 1.99 <= by_name[name]["flops"] / sgd["flops"] <= 2.02
  assert by_name["momentum_sam"]["flops"] <= 1.02 * sgd["flops"]
  assert len(by_name["momentum_sam"]["collectives"]["all-reduce"]) == 1
