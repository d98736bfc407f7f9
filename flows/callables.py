"""Callables: the functions that a user names as `module:function` in the configuration."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.errors import FlowError


class UnusableCallable(FlowError):
    """What the configuration names is not there, or is no function."""


def load_callable(name: str, key: str) -> Callable[..., Any]:
    """The function that `key` of the configuration names; the working folder is looked at last."""
    module_name, separator, attribute = name.partition(":")
    if not (module_name and separator and attribute):
        raise UnusableCallable(f"{key} = {name!r} names no function: write module:function")
    # Last, so that a `flows` or `daemon` package lying there never hides ours.
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except ImportError as error:
        raise UnusableCallable(
            f"{key} = {name!r}: {error}; is the module installed, or in {folder}?"
        ) from error
    if not callable(found):
        raise UnusableCallable(f"{key} = {name!r}: {module_name} has no function {attribute}")
    return found  # type: ignore[no-any-return]
