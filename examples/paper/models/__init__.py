"""The networks of the paper's experiments, by name."""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from examples.paper.models import convolution
from examples.paper.models import densenet
from examples.paper.models import layers
from examples.paper.models import pyramid
from examples.paper.models import resnet
from examples.paper.models import transformer
from examples.paper.models import vgg
from examples.paper.models import vit
from examples.paper.models import wide

__all__ = ["NAMES", "TRANSLATORS", "build"]


def _resnet(depth, **sizes):
  return lambda classes, make: resnet.ResNet(classes, depth, make, **sizes)


def _wide(depth, widen):
  return lambda classes, make, dropout=0.0: wide.WideResNet(
      classes, depth, widen, dropout, make
  )


def _vit(classes, make, depth=6, width=96, heads=3, patch=4, dropout=0.0):
  return vit.ViT(classes, depth, width, heads, patch, dropout, make.dtype)


def _transformer(vocabulary, make, **sizes):
  return transformer.Transformer(vocabulary, dtype=make.dtype, **sizes)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": _resnet(8),
    # Four times the weights in half of the time on a CPU, for the same FLOPs.
    "resnet8_wide": _resnet(8, width=32, stride=2),
    "resnet20": _resnet(20),
    "resnet32": _resnet(32),
    "resnet56": _resnet(56),
    "resnext29_32x4d": lambda classes, make: resnet.ResNeXt(classes, 29, 32, 4, make),
    "vgg19_bn": lambda classes, make: vgg.VGG(classes, vgg.VGG19, make),
    "densenet121": lambda classes, make, **options: densenet.densenet(
        classes, make, (6, 12, 24, 16), **options
    ),
    "wrn16_8": _wide(16, 8),
    "wrn28_2": _wide(28, 2),
    "wrn28_10": _wide(28, 10),
    "pyramidnet272": lambda classes, make, shake_drop=0.5: pyramid.PyramidNet(
        classes, 272, 200, shake_drop, make
    ),
    "resnet50": lambda classes, make: resnet.ImageNetResNet(
        classes, (3, 4, 6, 3), make
    ),
    "vit_small": _vit,
    # A sixth of the FLOPs: sixteen patches in place of sixty-four, four blocks of six.
    "vit_tiny": functools.partial(_vit, depth=4, patch=8),
    "transformer": _transformer,
    "transformer_small": functools.partial(
        _transformer, depth=3, width=128, hidden=256, heads=4
    ),
}
NAMES = tuple(_BUILDERS)
TRANSLATORS = ("transformer", "transformer_small")
_CONVOLUTIONS = {"lax": None, "shifts": convolution.convolve}


def build(
    name: str,
    classes: int,
    *,
    dtype: Any = jnp.float32,
    conv: str | Callable[..., jax.Array] = "lax",
    **options: Any,
) -> nn.Module:
  """The network of this name, as a Flax module ``(x, train) -> logits``.

  Translators are called ``(source, target_in, train) -> logits``.

  Args:
    name: one of ``NAMES``.
    classes: the number of logits; of a translator, the size of its vocabulary.
    dtype: of the computation, ``jnp.bfloat16`` for instance; parameters, batch
      statistics and logits are float32.
    conv: what computes the convolutions: "lax" is XLA's own; "shifts" may be faster for
      3x3 kernels on one CPU and has no forward-mode derivative. Or a function that
      ``nn.Conv`` takes as its ``conv_general_dilated``.
    **options: what the network has of its own: ``dropout`` (Wide ResNets, ViTs,
      transformers), ``stem`` (densenet121: "cifar" or "imagenet"), ``shake_drop``
      (pyramidnet272: the last block's probability), ``depth``, ``width``, ``heads``
      (ViTs, transformers), ``patch`` (ViTs), ``hidden`` (transformers).

  Returns:
    A module whose collections are ``params`` and, with batch norm, ``batch_stats``,
    and whose random streams are ``params`` and, in training, ``dropout`` for networks
    with dropout and ``shakedrop`` for pyramidnet272.

  Raises:
    ValueError: for an unknown name or option, or a number of classes below 2.

  Example:
    >>> build("resnet20", classes=10).depth
    20
  """
  if name not in _BUILDERS:
    raise ValueError(f"name={name!r}: no such network; there are {', '.join(NAMES)}.")
  if classes < 2:
    raise ValueError(f"classes={classes}: must be at least 2.")
  convolve = _CONVOLUTIONS.get(conv) if isinstance(conv, str) else conv
  if isinstance(conv, str) and conv not in _CONVOLUTIONS:
    raise ValueError(f"conv={conv!r}: must be one of {', '.join(_CONVOLUTIONS)}.")
  try:
    make = layers.Layers(dtype, convolve)
    return _BUILDERS[name](classes, make, **options)
  except TypeError as error:
    raise ValueError(f"options {options} of {name}: {error}") from error
