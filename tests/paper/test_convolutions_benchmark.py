"""The benchmark of convolutions compares what is equal, in processes of their own."""

import json

import jax
from jax import lax
import numpy as np
import pytest

from benchmarks import convolutions


@pytest.mark.parametrize("spelling", [
    convolutions.patches, convolutions.channels_first,
])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_spellings_are_equal(spelling, size, stride):
  images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 5))
  padding = [(size // 2, size // 2)] * 2
  expected = lax.conv_general_dilated(
      images, kernel, (stride, stride), padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  found = spelling(images, kernel, (stride, stride), padding)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_process_for_each_case(tmp_path, capsys):
  output = tmp_path / "x.jsonl"
  convolutions.main([
      "--model", "resnet8", "--batch-size", "2", "--steps", "1", "--rounds", "1",
      "--cases", "patches", "--output", str(output),
  ])
  (row,) = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
  assert row["milliseconds"][1] > 0
  assert row["to_first"] == [1.0, 1.0, 1.0]
  assert "1.000 [1.000, 1.000] of patches" in capsys.readouterr().out


def test_an_unknown_case_or_network_is_refused():
  with pytest.raises(SystemExit, match=r"model=resnet9: .*no such network"):
    convolutions.main(["--model", "resnet9"])
  with pytest.raises(SystemExit, match=r"cases=.'fft'.: there are XLA, channels first"):
    convolutions.main(["--cases", "fft"])
