"""The rows that two cores can train, in the order of their value.

Sharpness matters once a network can learn its training set by heart. The paper's
networks do so in 200 epochs of 50,000 images; in the time of two cores a small one does
so in 60 epochs of 2,000. A table with ten times the images in a fifth of the epochs,
where training accuracy stays at test accuracy, stands beside it.

Three seeds, and five where the radius that sets itself is judged and a run takes
minutes. Radii are chosen on 5,000 held-out training images with the first seed, from
the paper's radius and its neighbours; from seven where the radius that sets itself is
judged by it. A sweep takes all the epochs, for what a radius is good for shows once the
training set is learned; half of them in the two tables of many images or sentences,
where it never is.

Two processes, each on a core of its own, share the runs:

    for core in 0 1; do
      XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=DOT taskset -c $core python -m \
        examples.paper.run small --data PATH --labels PATH --text PATH &
    done

The flag chooses other convolutions of XLA's, which were faster here with JAX 0.10.
"""

import dataclasses
from typing import Any

from examples.paper import configs
from examples.paper.config import Config
from examples.paper.plans import Entry
from examples.paper.plans import Sweep

replace = dataclasses.replace

SAM_RADII = (0.025, 0.05, 0.1)
ASAM_RADII = (0.25, 0.5, 1.0)
SEVEN = (0.0625, 0.125, *ASAM_RADII, 2.0, 4.0)
THREE, FIVE = tuple(range(3)), tuple(range(5))  # seeds

CIFAR10 = Config(
    name="cifar10-small", table="cifar10-small", model="resnet8", examples=20_000,
    epochs=12, eval_every=3,
)
FEW = replace(
    CIFAR10, name="cifar10-few", table="cifar10-few", model="resnet8_wide",
    examples=2_000, epochs=60, eval_every=12,
)
WORSE = replace(
    FEW, name="cifar10n-small", table="cifar10n-small", human_labels="worse",
    eval_every=4,  # the best epoch stands beside the last
)
NOISY = replace(
    WORSE, name="noise-small", table="noise-small", human_labels="", noise=0.4
)
CIFAR100 = replace(
    FEW, name="cifar100-small", table="cifar100-small", dataset="cifar100",
    examples=5_000, epochs=30, eval_every=6,
)
NORMALIZATION = replace(
    FEW, name="normalization-small", table="normalization-small",
    examples=1_000, epochs=40, eval_every=40,
)
VIT = replace(
    FEW, name="vit-small", table="vit-small", model="vit_tiny", epochs=40,
    eval_every=10,
    base="adamw", learning_rate=1e-3, weight_decay=0.05, warmup=50,
)
# Multi30k, German to English, 29,000 sentences.
TRANSLATION = Config(
    name="multi30k", table="multi30k", dataset="parallel", model="transformer_small",
    base="adamw", learning_rate=2e-3, schedule="inverse_sqrt", warmup=300, beta2=0.98,
    weight_decay=1e-4, dropout=0.1, epochs=4, eval_every=2, vocabulary=4000,
    subwords=2048,
)


def row(config: Config, suffix: str, **fields: Any) -> Config:
  """A row of the configuration's table."""
  return replace(config, name=f"{config.name}-{suffix}", **fields)


def basic(
    config: Config, plain: str = "sgd", sam=SAM_RADII, asam=ASAM_RADII, share=1.0,
    seeds=THREE,
) -> list[Entry]:
  """The base optimizer, ASAM, SAM, at equal epochs; seeds: of the first two."""
  return [
      Entry(row(config, plain), seeds),
      Entry(row(config, "asam", method="asam"), seeds, Sweep(asam, share=share)),
      Entry(row(config, "sam", method="sam"), sweep=Sweep(sam, share=share)),
  ]


def doubled(config: Config, plain: str = "sgd") -> Entry:
  """The base optimizer at the cost of the others."""
  return Entry(row(config, f"{plain}-double", epochs=2 * config.epochs,
                   eval_every=2 * config.eval_every))


def auto(config: Config, seeds=THREE) -> Entry:
  """The radius that sets itself, as it comes."""
  return Entry(row(config, "auto", method="auto"), seeds)


def auto_milder(config: Config, cosine: float) -> Entry:
  """The same with a target that turns the gradient less."""
  return Entry(row(config, f"auto-{cosine:g}", method="auto", cosine=cosine))


def cheaper(config: Config) -> list[Entry]:
  """The methods that save the second gradient, or most of them."""
  asam = f"{config.name}-asam"
  momentum = "adaptive_momentum_sam"
  return [
      Entry(row(config, "late", method="late"), like=asam),
      Entry(row(config, "looksam", method="looksam"), sweep=Sweep(ASAM_RADII)),
      Entry(row(config, "momentum", method=momentum), sweep=Sweep(ASAM_RADII)),
  ]


def like(config: Config, other: Config) -> list[Entry]:
  """As ``basic``, with the radii that the other data chose."""
  plain, asam, sam = basic(config)
  return [
      plain,
      dataclasses.replace(asam, sweep=None, like=f"{other.name}-asam"),
      dataclasses.replace(sam, sweep=None, like=f"{other.name}-sam"),
  ]


def with_auto(config: Config, *args: Any, **kwargs: Any) -> list[Entry]:
  """As ``basic``, with the auto radius before SAM."""
  plain, asam, sam = basic(config, *args, **kwargs)
  return [plain, asam, auto(config, asam.seeds), sam]


VIT_ROWS = with_auto(VIT, "adamw", asam=SEVEN, seeds=FIVE)
# Adam for as many epochs as the others, as in the paper.
TRANSLATION_ROWS = with_auto(
    TRANSLATION, "adam", sam=(0.05, 0.1, 0.2),
    asam=(0.0125, 0.025, 0.05, 0.1, 0.2, 0.4), share=0.5,
)

PLAN: tuple[Entry, ...] = (
    *basic(FEW, asam=SEVEN, seeds=FIVE),
    doubled(FEW),
    auto(FEW, FIVE),
    *cheaper(FEW),
    auto_milder(FEW, 0.9),
    *basic(WORSE, asam=SEVEN, seeds=FIVE),
    auto(WORSE, FIVE),
    auto_milder(WORSE, 0.9),
    *VIT_ROWS[:3],
    *TRANSLATION_ROWS[:3],
    # The angle that tuned radii have where training ends before it is learned by heart.
    *(auto_milder(config, 0.98) for config in (VIT, FEW, WORSE, TRANSLATION)),
    VIT_ROWS[3],
    TRANSLATION_ROWS[3],
    *like(CIFAR100, FEW),
    *like(NOISY, WORSE),
    # Whether it is the reused direction that holds LookSAM back.
    Entry(row(FEW, "looksam-0.2", method="looksam", reuse=0.2),
          like=f"{FEW.name}-looksam"),
    *(Entry(config, (0,)) for config in configs.normalization(NORMALIZATION)),
    # Where the network does not learn its training set.
    *basic(CIFAR10, share=0.5),
    # They cost as much as two gradients, and of wrong labels the best epoch beside the
    # last says more.
    *(doubled(config) for config in (CIFAR10, WORSE, CIFAR100, NOISY)),
    doubled(VIT, "adamw"),
    *(Entry(config, (1, 2)) for config in configs.normalization(NORMALIZATION)),
)
