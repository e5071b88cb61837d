"""Turning a method's knob to a budget: the setting whose FLOP ratio on one clip is nearest to the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .methods import CEILING, FLOOR, Method
from .rehearsal import rehearse
from .scenes import CALIBRATION, Scene


def turn(method: Method, budget: float, ratio: Callable[[Any], float]) -> Any | None:
    """Setting for a target FLOP ratio, None where the method does not reach it.

    The knob is bisected for the target; of the settings tried the nearest counts that is not below ``FLOOR`` and not
    above ``CEILING`` times the target.

    Args:
        ratio: FLOP ratio of a setting, which rises with it.
    """
    if method.rival:
        return budget
    low, high, tried = 0, len(method.settings), {}
    while low < high:
        middle = (low + high) // 2
        tried[middle] = ratio(method.settings[middle])
        low, high = (middle + 1, high) if tried[middle] < budget else (low, middle)
    fitting = {place: value for place, value in tried.items() if FLOOR * budget <= value <= CEILING * budget}
    if not fitting:
        return None
    return method.settings[min(fitting, key=lambda place: abs(fitting[place] - budget))]


def probe(method: Method, scene: Scene, setting: Any) -> float:
    """FLOP ratio of a setting: counted without the model where that is enough, else of the calibration clip."""
    full, options = rehearse(scene).totals()["flops"], method.build(setting, scene)
    timeline = rehearse(scene, **options) if method.rehearsed else scene.run(CALIBRATION, **options).timeline
    return full / timeline.totals()["flops"]
