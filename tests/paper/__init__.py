"""Tests of the paper's experiments."""

import pytest

for module in (
    "flax", "grain", "orbax.checkpoint", "PIL", "sacrebleu", "tensorboardX",
    "tokenizers", "tyro",
):
  pytest.importorskip(module, reason="the experiments need the extra 'paper'")
