"""Functions as arguments under ``optax.inject_hyperparams``."""

from collections.abc import Callable
import functools
import inspect
from typing import Any, NamedTuple, TypeVar

Factory = TypeVar("Factory", bound=Callable[..., Any])


class _Kept(NamedTuple):
  """A function that is an argument, not a schedule."""

  function: Callable[..., Any]


class _Signature(inspect.Signature):
  """A signature that hands the arguments named here on as they are."""

  kept: tuple[str, ...] = ()

  def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    bound = super().bind(*args, **kwargs)
    for name in self.kept:
      if callable(bound.arguments.get(name)):
        bound.arguments[name] = _Kept(bound.arguments[name])
    return bound


def keeps(*names: str) -> Callable[[Factory], Factory]:
  """For a factory whose arguments of these names may be functions of leaves.

  ``optax.inject_hyperparams`` takes every callable argument for a schedule and calls
  it with the step count. It sorts the arguments by the factory's signature, so this
  signature wraps those that are no schedules, and the factory unwraps them.
  """

  def decorate(factory: Factory) -> Factory:
    @functools.wraps(factory)
    def unwrapping(*args: Any, **kwargs: Any) -> Any:
      for name, value in kwargs.items():
        kwargs[name] = value.function if isinstance(value, _Kept) else value
      return factory(*args, **kwargs)

    plain = inspect.signature(factory)
    signature = _Signature(
        list(plain.parameters.values()), return_annotation=plain.return_annotation
    )
    signature.kept = names
    setattr(unwrapping, "__signature__", signature)  # noqa: B010
    return unwrapping  # pyright: ignore[reportReturnType]

  return decorate
