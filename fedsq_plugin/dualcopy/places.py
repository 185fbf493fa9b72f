"""Where in a model a torch function is called: the path of the calling module, and the place in its code.

A gate belongs to a call, so a call must be recognised in both copies, in every forward. The number of a call
is not enough: a model may leave layers out, or choose between them.
"""

from __future__ import annotations

import copy
from types import CodeType, FrameType
from typing import Any

from torch import nn

Position = tuple[int | None, ...]
Site = tuple[tuple[str, Position], ...]
"""Function, and position in its text, of each Python frame between the called function and its module."""
Place = tuple[str, Site]
"""Path of the module, and the call's place in the module's code."""


_positions: dict[int, tuple[CodeType, tuple[Position, ...]]] = {}


def _find_position(frame: FrameType) -> Position:
    """Return where in its text a frame is: lines and columns.

    The number of the instruction is not enough: from Python 3.11 on, a call that is often made is done by another
    instruction.
    """
    code = frame.f_code
    known = _positions.get(id(code))
    if known is None:
        positions = getattr(code, "co_positions", None)  # new in Python 3.11
        known = _positions[id(code)] = code, tuple(positions()) if positions is not None else ()
    return known[1][frame.f_lasti // 2] if known[1] else (frame.f_lineno, frame.f_lasti)


class Places:
    """Finds the module of one model that calls a function, by the frames of Python's stack."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._paths: dict[int, tuple[nn.Module, str]] = {}
        self._read_paths()

    def __reduce__(self) -> tuple[Any, ...]:
        return Places, (self._model,)  # the paths go by `id`, which a copy does not keep

    def __deepcopy__(self, memo: dict[int, Any]) -> Places:
        return Places(copy.deepcopy(self._model, memo))

    def _read_paths(self) -> None:
        # The module is kept beside its path, so that its `id` stays its own.
        self._paths = {id(module): (module, path) for path, module in self._model.named_modules()}
        self.buffered = [module for module, _ in self._paths.values() if module._buffers]
        """The modules with buffers."""

    def find(self, frame: FrameType | None) -> Place:
        """Return the place of the call that is made in `frame` or in a frame around it."""
        return self._search(frame) or self._search_again(frame)

    def _search(self, frame: FrameType | None) -> Place | None:
        site, paths = [], self._paths
        while frame is not None:
            code = frame.f_code
            site.append((code.co_name, _find_position(frame)))
            # Methods are enough: every call of a module passes a method of nn.Module.
            if code.co_argcount and code.co_varnames[0] == "self":
                module = frame.f_locals.get("self")
                found = paths.get(id(module))
                if found is not None:
                    return found[1], tuple(site)
                if isinstance(module, nn.Module) and self._is_new(module):
                    return None
            frame = frame.f_back
        return "", ()

    def _is_new(self, module: nn.Module) -> bool:
        """Return whether the module came into the model after its paths were read. Then read them again."""
        if not any(module is other for other in self._model.modules()):
            return False
        self._read_paths()
        return True

    def _search_again(self, frame: FrameType | None) -> Place:
        return self._search(frame) or ("", ())
