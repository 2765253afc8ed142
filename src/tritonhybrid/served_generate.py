"""The wrapped module's ``generate``, which finds its engine by the module's identity."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from tritonhybrid.containers.parts import own_generate

# Which engine serves a module's generate. Weak and by identity: a deep copy of the
# module (a reference model) is not registered and keeps HF's own generate.
_ENGINES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class ServedGenerate:
    """The wrapped module's ``generate``: its engine's, as long as there is one.

    Copying or pickling the module copies this with it, bound to the copy; the copy
    is not registered, so it runs HF's generate with its own weights.

    Args:
        module: Whose generate this is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Serve through the engine if this very module is wrapped, else as HF does."""
        engine = _ENGINES.get(id(self.module))
        if engine is not None and engine.module is self.module:
            return engine.generate(*inputs, **kwargs)
        return own_generate(self.module)(*inputs, **kwargs)


def take_over(engine: Any) -> Any:
    """Put the engine's generate in the place of its module's.

    Returns:
        The module's own instance attribute ``generate``, if any.
    """
    module: nn.Module = engine.module
    had_generate = module.__dict__.get("generate")
    if isinstance(had_generate, ServedGenerate):
        # The module is a copy of a wrapped one; its generate would lead back to that engine.
        had_generate = None
    _ENGINES[id(module)] = engine
    module.__dict__["generate"] = ServedGenerate(module)
    return had_generate


def give_back(engine: Any, had_generate: Any) -> None:
    """Undo :func:`take_over`.

    Args:
        engine: The same.
        had_generate: What it returned.
    """
    module: nn.Module = engine.module
    _ENGINES.pop(id(module), None)
    module.__dict__.pop("generate", None)
    if had_generate is not None:
        module.__dict__["generate"] = had_generate
