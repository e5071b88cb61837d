"""The velocity at a new noise level, extrapolated from stored ones, per latent frame.

Newest first, with ``D = s* - s0``, ``D0 = s0 - s1``, ``D1 = s1 - s2``, ``f1 = (v0 - v1) / D0``, ``f2 = (v1 - v2) /
D1``:

    order 0     v0
    order 1     v0 + f1 D
    order 2     v0 + f1 D + (f1 - f2) / (D0 + D1) D^2             SCOPE eq. 7, arXiv 2604.02979
    newton2     v0 + f1 D + (f1 - f2) / (D0 + D1) D (D + D0)      exact on quadratics, as eq. 7 is not
    auto        order 2 where |D| <= |D0| / 2, else order 1

Noise levels are known, so the weights of the stored velocities are computed on the host in float64; only the weighted
sums and the norms of the guards run on the device, and nothing is read back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .history import SAME_SIGMA, VelocityHistory

ORDERS = (0, 1, 2, "newton2", "auto")


@dataclass(frozen=True, slots=True)
class Guards:
    """Bounds on a prediction, per latent frame of each batch entry; None turns a bound off.

    Readings of SCOPE's "stability checks and conservative clipping" (arXiv 2604.02979), which the paper leaves open.

    Attributes:
        alpha_max: ``D / D0`` is clamped to ``[0, alpha_max]``: no further ahead than this many stored steps, never
        back.
        correction_max: the RMS of what is added to the newest velocity is at most this part of that velocity's RMS.
        curvature_max: the RMS of the second-order term is at most this multiple of the first-order term's RMS.

    Raises:
        ValueError: a bound that is not a finite number >= 0.
    """

    alpha_max: float | None = 2.0
    correction_max: float | None = 0.35
    curvature_max: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha_max", "correction_max", "curvature_max"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"Guards: {name} {value} must be a finite number >= 0; use None to turn it off.")


DEFAULT_GUARDS = Guards()


def check_prediction(node: str, order: int | str, reach: float | None) -> None:
    """Raises ValueError, in the name of ``node``, for an order or a reach that no prediction can have."""
    if order not in ORDERS[1:]:
        raise ValueError(f"{node}: order is {order!r}; use {', '.join(map(str, ORDERS[1:-1]))} or {ORDERS[-1]}.")
    if reach is not None and not reach > 0:
        raise ValueError(f"{node}: reach is {reach}; use a number above 0, or None for no limit.")


def extrapolate(
    sigmas: Tensor | Sequence[float],
    velocities: Tensor | Sequence[Tensor],
    target: Tensor | float,
    order: int | str,
) -> Tensor:
    """Velocity at ``target`` from stored velocities, newest first, without any clipping.

    Too few points, or points at one noise level (within 1e-6), lower the order; a newest pair at one noise level, or a
    target at the newest, gives the newest velocity.

    Args:
        sigmas: noise levels ``[n]``, ``[n, T]`` or ``[n, B, T]``.
        velocities: n tensors or one stacked tensor, ``[n, B, C, T, H, W]``; any trailing shape where ``sigmas`` is
            ``[n]`` and ``target`` a number.
        target: noise level wanted, a number, ``[T]`` or ``[B, T]``.
        order: 0 (hold), 1, 2 (SCOPE eq. 7), ``"newton2"`` or ``"auto"``.

    Returns:
        fp32 velocity of the shape of one stored velocity, a new tensor.

    Raises:
        ValueError: unknown order, no velocity, or counts and shapes that disagree.
    """
    if isinstance(sigmas, (list, tuple)) and any(isinstance(entry, Tensor) for entry in sigmas):
        sigmas = torch.stack([torch.as_tensor(entry) for entry in sigmas])
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if levels.ndim == 0 or len(levels) != len(velocities) or len(levels) == 0:
        raise ValueError(
            f"extrapolate: {len(velocities)} velocities need one noise level each and at least one of both, "
            f"got sigmas of shape {tuple(levels.shape)}."
        )
    goal = torch.as_tensor(target, dtype=torch.float64, device=levels.device)
    shape = torch.broadcast_shapes(levels.shape[1:], goal.shape)
    newest = velocities[0]
    batch, width = (1, *shape)[-2:] if shape else (1, 1)
    fits = len(shape) <= 2 and newest.ndim == 5 and batch in (1, len(newest)) and width in (1, newest.shape[2])
    if shape and not fits:
        raise ValueError(
            f"extrapolate: noise levels per frame, [T] or [B, T], need velocities [B, C, T, H, W] of the same B and "
            f"T; got {tuple(shape)} and {tuple(newest.shape)}."
        )
    levels = levels.reshape(len(levels), *(1,) * (len(shape) - levels.ndim + 1), *levels.shape[1:])
    linear, curved = weights(levels.expand(-1, *shape), goal.expand(shape), order)
    gains = (linear + curved).cumsum(0)[:-1].float().to(newest.device, non_blocking=True)
    if shape:
        gains = gains.reshape(len(gains), batch, 1, width, 1, 1)
    total = newest.to(torch.float32, copy=True)
    for index, gain in enumerate(gains):
        total.addcmul_(velocities[index].float() - velocities[index + 1].float(), gain)
    return total


def weights(sigmas: Tensor, target: Tensor, order: int | str, alpha_max: float | None = None) -> tuple[Tensor, Tensor]:
    """Weights of the stored velocities in what is added to the newest one.

    Args:
        sigmas: ``[n, ...]`` float64, newest first.
        target: ``[...]`` float64.
        order: see the head of this module.
        alpha_max: clamps ``D / D0`` to ``[0, alpha_max]``; None for no clamp.

    Returns:
        First-order and second-order weights ``[m, ...]``, m <= n the points the order uses; each sums to 0 over the
        points.

    Raises:
        ValueError: unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"predict: order {order!r} is not known; use one of {', '.join(map(repr, ORDERS))}.")
    points = min(len(sigmas), {0: 1, 1: 2}.get(order, 3))
    linear, curved = torch.zeros_like(sigmas[:points]), torch.zeros_like(sigmas[:points])
    if points < 2:
        return linear, curved
    ahead = target - sigmas[0]
    newer = sigmas[0] - sigmas[1]
    usable = (newer.abs() >= SAME_SIGMA) & (ahead.abs() >= SAME_SIGMA)
    newer = torch.where(usable, newer, 1.0)
    alpha = torch.where(usable, ahead / newer, 0.0)
    if alpha_max is not None:
        alpha = alpha.clamp(0.0, alpha_max)
    linear[0], linear[1] = alpha, -alpha
    if points < 3:
        return linear, curved
    older = sigmas[1] - sigmas[2]
    span = sigmas[0] - sigmas[2]
    bent = usable & (older.abs() >= SAME_SIGMA) & (span.abs() >= SAME_SIGMA)
    if order == "auto":
        bent &= ahead.abs() <= 0.5 * newer.abs()
    reach = alpha * newer
    reach = reach * (reach + newer) if order == "newton2" else reach * reach
    bend = torch.where(bent, reach / torch.where(bent, span, 1.0), 0.0)
    curved[0], curved[2] = bend / newer, bend / torch.where(bent, older, 1.0)
    curved[1] = -curved[0] - curved[2]
    return linear, curved


def predict(
    history: VelocityHistory,
    frames: tuple[int, int],
    targets: Sequence[float],
    order: int | str = 1,
    guards: Guards = DEFAULT_GUARDS,
) -> Tensor:
    """Guarded prediction of a window, each latent frame from its own stored velocities.

    A frame with fewer entries gets a lower order, a frame that stands still its newest velocity. A correction that is
    not finite is dropped: the newest velocity stays.

    Args:
        history: true velocities.
        frames: window ``[start, end)`` in latent frames of the segment.
        targets: noise level of each latent frame of the window, host numbers.
        order: 0, 1, 2, ``"newton2"`` or ``"auto"``.
        guards: bounds, see ``Guards``.

    Returns:
        fp32 ``[B, C, T, H, W]``, a new tensor.

    Raises:
        ValueError: a frame without a stored velocity, targets that are not finite or not one per frame, unknown order.
    """
    if len(targets) != frames[1] - frames[0] or not all(map(math.isfinite, targets)):
        raise ValueError(f"predict: window {frames} needs one finite noise level per latent frame, got {targets}.")
    newest = history.newest(frames)
    levels = history.levels(frames)
    depth = max(map(len, levels))
    sigmas = torch.tensor([entries + entries[-1:] * (depth - len(entries)) for entries in levels], dtype=torch.float64)
    linear, curved = weights(sigmas.T, torch.tensor(targets, dtype=torch.float64), order, guards.alpha_max)
    if not (linear.any() or curved.any()):
        return newest.clone()
    correction = history.combine(frames, linear)
    if curved.any():
        bend = history.combine(frames, curved)
        if guards.curvature_max is not None:
            bend *= _shrink(_norm(bend), guards.curvature_max * _norm(correction))
        correction += bend
    size = _norm(correction)
    if guards.correction_max is not None:
        correction *= _shrink(size, guards.correction_max * _norm(newest))
    return torch.where(size.isfinite(), newest + correction, newest)


def hold(history: VelocityHistory, frames: tuple[int, int]) -> Tensor:
    """Newest stored velocity of every latent frame of the window, fp32 ``[B, C, T, H, W]``, a new tensor.

    Raises:
        ValueError: a frame without a stored velocity.
    """
    return history.newest(frames).clone()


def _norm(value: Tensor) -> Tensor:
    """L2 norm of each latent frame of each batch entry, ``[B, 1, T, 1, 1]``; norms of one shape compare as RMS do."""
    return torch.linalg.vector_norm(value, dim=(1, 3, 4), keepdim=True)


def _shrink(size: Tensor, limit: Tensor) -> Tensor:
    """Factor in [0, 1] that brings ``size`` down to ``limit``."""
    return (limit / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp(max=1.0)
