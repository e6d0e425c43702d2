"""The model of scale: its arithmetic, and that its command says what it assumes."""

import json

import jax
import pytest

pytest.importorskip("matplotlib", reason="the pictures need the extra 'examples'")
pytest.importorskip("flax", reason="the networks need the extra 'examples'")

from benchmarks import scale
from benchmarks.pod import check
from benchmarks.pod import scaling

# Round numbers: 10 operations and 100 bytes a second, 4 bytes a second to neighbours.
CHIP = scaling.Chip("toy", 10, 100, 4, 16, 2, 0, 0)


def row(method="SGD", chips=4, flops=20.0, bytes_=100.0, reduced=(8,)):
  collectives = {"all-reduce": list(reduced)}
  numbers = {"flops": flops, "bytes_accessed": bytes_, "collectives": collectives}
  return {"part": "mlp", "chip": "toy", "method": method, "chips": chips} | numbers


def test_compute_is_the_longer_of_operations_and_bytes():
  assert scaling.step_time(row(), 1, CHIP) == (2.0, 0.0)
  assert scaling.step_time(row(bytes_=500.0), 1, CHIP) == (5.0, 0.0)


def test_exchanges_by_hand():
  # A ring of 4 moves 2 * 8 * 3/4 = 12 bytes past a device, at 4 a second.
  assert scaling.exchange_time("all-reduce", 8, 4, CHIP) == 3.0
  assert scaling.exchange_time("all-gather", 8, 4, CHIP) == 1.5
  assert scaling.exchange_time("reduce-scatter", 8, 4, CHIP) == 1.5
  # Two slices of 16: each chip has 32/16 = 2 bytes, of which half go over the network.
  inside = 2 * 32 * 15 / 16 / 4
  assert scaling.exchange_time("all-reduce", 32, 32, CHIP) == inside + 2 * 1 / 2
  hops = CHIP._replace(hop=1.0)
  assert scaling.exchange_time("all-reduce", 0, 16, hops) == 2 * 4
  assert scaling.exchange_time("all-reduce", 0, 1, hops) == 0


def test_exposed_and_hidden_bound_the_step():
  time = scaling.Time(compute=2.0, exchange=3.0)
  assert (time.exposed, time.hidden) == (5.0, 3.0)


def test_predictions_compare_with_sgd_and_with_one_chip():
  rows = [row(), row("adaptive_sam", flops=40.0, reduced=(8, 8))]
  results = scaling.predictions(rows, [1, 4], CHIP)
  by_key = {(each["method"], each["chips"]): each for each in results}
  assert by_key["SGD", 1]["efficiency_exposed"] == 1
  assert by_key["SGD", 4]["efficiency_exposed"] == 2 / 5
  assert by_key["adaptive_sam", 4]["ratio_exposed"] == (4 + 6) / (2 + 3)
  assert by_key["adaptive_sam", 4]["ratio_hidden"] == 6 / 3


def test_efficiency_never_rises_with_chips():
  sizes = scale.SIZES
  results = scaling.predictions([row(reduced=(10**9,))], sizes, scaling.V5E)
  for kind in ("exposed", "hidden"):
    values = [each[f"efficiency_{kind}"] for each in results]
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] < values[0] == 1


def test_nearest_compiled_size_is_taken():
  rows = [row(chips=4), row(chips=256, flops=30.0)]
  results = scaling.predictions(rows, [1, 8, 128, 1024], CHIP)
  assert [each["compute_seconds"] for each in results] == [2, 2, 3, 3]


def test_command_writes_table_and_picture(tmp_path, capsys):
  costs = tmp_path / "pod.jsonl"
  part = {"part": "transformer", "layers": 2, "extrapolated_from": [1, 2]}
  rows = [row(name) for name in scale.METHODS]
  rows += [row() | part, row() | {"part": "transformer", "layers": 1}]
  lines = [{"command": []}, *rows, row("LookSAM, other steps")]
  costs.write_text("".join(json.dumps(each) + "\n" for each in lines))
  more = tmp_path / "more.jsonl"
  more.write_text(json.dumps(row("SGD", chips=64)) + "\n")
  given = ["--costs", costs, more, "--folder", tmp_path / "new" / "scale"]
  results = scale.main([str(each) for each in given])
  assert len(results) == len(scale.SIZES) * (len(scale.METHODS) + 1)
  printed = capsys.readouterr().out
  assert "Assumptions of the model" in printed
  assert "EXTRAPOLATED from 1 and 2" in printed
  assert "compiled for 4, 64 chips" in printed
  folder = tmp_path / "new" / "scale"
  assert (folder / "scale.png").stat().st_size > 10_000
  assert (folder / "scale.md").read_text().strip() in printed
  written = (folder / "scale.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in written] == results


def test_missing_costs_say_what_to_do(tmp_path):
  path = tmp_path / "none.jsonl"
  with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.pod --results"):
    scale.main(["--costs", str(path)])


def test_check_measures_every_method():
  devices = min(2, jax.device_count())
  rows = check.measure(devices, repeats=2, layers=1, width=8, batch=2)
  assert [each["method"] for each in rows] == list(check.METHODS)
  assert rows[0]["predicted_ratio"] == 1
  assert rows[0]["measured_ratio"] == [1, 1, 1]
  for each in rows:
    assert each["predicted_seconds"] > 0
    assert each["measured_ratio"][0] > 0
  assert all(f"| {name} |" in check.table(rows) for name in check.METHODS)
