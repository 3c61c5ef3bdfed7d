"""Putting another forward under a module's hooks, whichever was there first, and taking it out again.

A module's forward may have been wrapped by accelerate, which calls the attribute ``_old_forward``, and by diffusers'
hook registry, which calls what a hook's ``fn_ref`` holds. Both keep calling whatever stands in those places, so that
the innermost of them, where the class's own forward is, can be given another one at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastdiff.kernels.residual_norm_modulate import Rounding

Forward = Callable[..., Any]
Place = tuple[Any, str]
"""An object, and its attribute that holds a module's innermost forward."""


class Replacement:
    """What runs instead of the forward of one module.

    The module's own forward still runs while code is compiled, because a compiler fuses it with its surroundings; under
    autocast, which gives dtypes to single operations; in training; and for arguments that the other has no result for.

    Args:
        module: the module.
        original: its own forward.
        forward: takes the module, the rounding, and what the module's forward takes; gives what that gives, or
            ``NotImplemented`` before it has changed anything.
        rounding: how the kernels round, ``"fused"`` or ``"match_eager"``.
    """

    __slots__ = ("__wrapped__", "forward", "module", "rounding")

    def __init__(self, module: nn.Module, original: Forward, forward: Forward, rounding: Rounding) -> None:
        self.module = module
        self.forward = forward
        self.rounding = rounding
        # What other wrappers follow to the class's forward, and where inspect finds the signature.
        self.__wrapped__ = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in the place of the module's forward."""
        if torch.compiler.is_compiling() or self.module.training or _autocast():
            return self.__wrapped__(*args, **kwargs)
        result = self.forward(self.module, self.rounding, *args, **kwargs)
        return self.__wrapped__(*args, **kwargs) if result is NotImplemented else result


def put(module: nn.Module, forward: Forward, rounding: Rounding) -> bool:
    """Replace a module's innermost forward; False if something unknown stands in front of it."""
    place = innermost(module)
    if place is None:
        return False
    current = getattr(*place)
    original = current.__wrapped__ if isinstance(current, Replacement) else current
    setattr(*place, Replacement(module, original, forward, rounding))
    return True


def take(module: nn.Module) -> bool:
    """Put a module's own forward back; False if it was not replaced."""
    place = innermost(module)
    current = None if place is None else getattr(*place)
    if place is None or not isinstance(current, Replacement):
        return False
    if place == (module, "forward"):
        del vars(module)["forward"]
    else:
        setattr(*place, current.__wrapped__)
    return True


def innermost(module: nn.Module) -> Place | None:
    """Where a module's innermost forward is held; None if it is in none of the known places."""
    registry = getattr(module, "_diffusers_hook", None)
    references = [] if registry is None else registry._fn_refs
    places: list[Place] = [(module, "forward"), (module, "_old_forward")]
    places += [(reference, "original_forward") for reference in references]
    places += [(reference, "forward") for reference in references]
    for place in places:
        held = getattr(*place, None)
        if isinstance(held, Replacement) or getattr(held, "__func__", None) is type(module).forward:
            return place
    return None


def _autocast() -> bool:
    return torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
