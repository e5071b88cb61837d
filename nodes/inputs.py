"""What a node's execute may be given: its schema's types, ranges and options.

Core checks values that were typed into a widget; what comes through a link (and NaN) it hands on as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from reprlib import Repr
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

SHORT = Repr()
SHORT.maxstring, SHORT.maxlong = 80, 40
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {}


def kind_of(io_type: str, fits: Callable[[Any], bool] | type, remedy: str) -> None:
    """Has inputs of a type checked by ``fits``, or by being of a class; ``remedy`` follows "connect"."""
    KINDS[io_type] = (lambda value: isinstance(value, fits)) if isinstance(fits, type) else fits, remedy


def checked(execute: Callable) -> Callable:
    """Puts a check of the inputs against the schema before a node's ``execute`` (below ``classmethod``).

    Whole numbers given as another type (16.0 for 16) are handed on as int; None for an optional input as nothing.

    Raises:
        ValueError: one sentence with the node, the input, the value and what is allowed.
    """
    names = signature(execute)

    @wraps(execute)
    def refuse_or_execute(cls: type[io.ComfyNode], *given: Any, **named: Any) -> io.NodeOutput:
        schema = cls.define_schema()
        bound = names.bind(cls, *given, **named).arguments
        values = dict(bound)
        for extra in (name for name, kind in names.parameters.items() if kind.kind is kind.VAR_KEYWORD):
            values |= values.pop(extra, {})
        for told in (told for told in schema.inputs if told.id in values):
            if told.optional and values[told.id] is None:
                del values[told.id]
            else:
                values[told.id] = _allowed(schema.display_name, told, values[told.id])
        values.pop(next(iter(names.parameters)))
        return execute(cls, **values)

    return refuse_or_execute


def shown(value: Any) -> str:
    """A value in a sentence: short, and on one line."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if not isinstance(value, str | int | float | bool | type(None)):
        return f"a {type(value).__name__}"
    return SHORT.repr(value)


def _allowed(node: str, told: Any, value: Any) -> Any:
    kind = told.get_io_type()
    if kind in ("INT", "FLOAT"):
        return _number(node, told, value, kind == "INT")
    if kind == "BOOLEAN" and not (isinstance(value, bool) or (isinstance(value, Integral) and value in (0, 1))):
        _refuse(node, told, value, "use true or false")
    if kind == "STRING" and not isinstance(value, str):
        _refuse(node, told, value, "use text")
    options = getattr(told, "options", None)
    if kind == "COMBO" and options and not (isinstance(value, str | int) and value in options):
        _refuse(node, told, value, f"use one of {', '.join(map(str, options))}")
    if kind in KINDS and not KINDS[kind][0](value):
        _refuse(node, told, value, f"connect {KINDS[kind][1]}")
    return value


def _number(node: str, told: Any, value: Any, whole: bool) -> Any:
    low, high = -math.inf if told.min is None else told.min, math.inf if told.max is None else told.max
    span = f" from {_figures(low)} to {_figures(high)}" if low > -math.inf and high < math.inf else ""
    fits = isinstance(value, Real) and -math.inf < value < math.inf and low <= value <= high
    if not fits or (whole and value != int(value)):
        _refuse(node, told, value, f"use a {'whole ' * whole}number{span}")
    return int(value) if whole else float(value)


def _figures(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _refuse(node: str, told: Any, value: Any, remedy: str) -> None:
    raise ValueError(f"{node}: {told.id} is {shown(value)}; {remedy}.")


def is_floats(value: Any) -> bool:
    """Whether it is a tensor of a floating type that every operation knows."""
    return isinstance(value, Tensor) and value.dtype in FLOATS


def is_finite(values: Tensor) -> bool:
    """Whether no number of a floating tensor is NaN or infinite; takes no memory."""
    return not values.numel() or all(math.isfinite(edge) for edge in values.aminmax())


def _is_conditioning(value: Any) -> bool:
    def entry(one: Any) -> bool:
        return isinstance(one, list | tuple) and len(one) == 2 and is_floats(one[0]) and isinstance(one[1], Mapping)

    return isinstance(value, list | tuple) and bool(value) and all(map(entry, value))


def _is_latent(value: Any) -> bool:
    return isinstance(value, Mapping) and hasattr(value.get("samples"), "shape")


kind_of("MODEL", lambda value: hasattr(value, "model_options") and hasattr(value, "model"), "the model of a loader")
kind_of("VAE", lambda value: hasattr(value, "decode"), "the VAE of a loader")
kind_of("CONDITIONING", _is_conditioning, "the conditioning of a text encoder")
kind_of("LATENT", _is_latent, "an empty video latent")
kind_of("IMAGE", is_floats, "the images that VAE Decode makes")
kind_of("SIGMAS", is_floats, "the sigmas of a scheduler node")
