"""The tiny models as the ``Denoiser`` that ``accel`` accelerates."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from accel.attention.ann import AnnConfig
from accel.call import Call, Kind
from accel.flops import WanShape
from accel.history_guidance import HiddenHistory, check_strength
from accel.kv.budget import KVBudgetConfig, StoreShape
from accel.kv.frozen import FrozenKV, FrozenView
from accel.kv.memory import KVMemory, make_memory
from accel.kv.rotary import TimeRotary
from accel.kv.store import KVStore
from accel.readback import on_device

from .model import PATCH, TinyWan, block_causal_mask
from .prompt import TEXT_DIM, TOKENS


class TinyDenoiser:
    """Guided velocity of a tiny model; both CFG branches run as one batch.

    Args:
        model: the transformer; ``model.config.kind`` says which regime it was trained for.
        context: prompt ``[B, 64, 64]``, or several by the segment each begins at, 0 among them.
        guidance: v = u + guidance (c - u); 1 runs the conditional branch alone.
        rollout: latent frames of the whole video, for the K/V store of a causal model.
        chunk: latent frames of a chunk, to look at earlier chunks only (block-causal attention, the same in every
            call); 0 sees the whole window.
        budget: how much K/V a causal model keeps; None keeps all. ann: how much of it a query reads; None all. calls:
            forwards of a block, see ``make_memory``.
        history_guidance: noise level that hides the history from the branch that is subtracted, 0 for none
            (``accel.history_guidance``).
        negative: prompt of that branch ``[B, 64, 64]``, None for the empty one; the prompt itself guides by history
            alone.

    Attributes:
        shape: the transformer's shape, from which FLOPs are counted.
    """

    def __init__(
        self, model: TinyWan, context: Tensor | Mapping[int, Tensor], guidance: float = 2.0, rollout: int = 0,
        chunk: int = 0, budget: KVBudgetConfig | None = None, ann: AnnConfig | None = None, calls: int = 1,
        history_guidance: float = 0.0, negative: Tensor | None = None,
    ) -> None:  # fmt: skip
        config = model.config
        self.model, self.guidance = model, guidance
        self.branches = 1 if guidance == 1.0 else 2
        self.shares_time = config.kind == "tiny-next-clip"
        self.recomputes_history = not config.causal_ar
        check_strength(history_guidance, self.branches, config.causal_ar)
        hides = bool(history_guidance)
        self._forgetful = hides and config.causal_ar
        self._hidden = HiddenHistory(history_guidance, self.shares_time) if hides and not config.causal_ar else None
        prompts = {0: context} if isinstance(context, Tensor) else context
        if self.branches == 2:
            prompts = {
                segment: torch.cat((one, torch.zeros_like(one) if negative is None else negative))
                for segment, one in prompts.items()
            }
        self._prompts = prompts
        self._rollout, self._chunk, self._memory = rollout, chunk, (budget, ann, calls)
        self._bounded = budget is not None or ann is not None or self._forgetful
        self._kept: FrozenKV | None = None
        self._store: KVStore | KVMemory | None = None
        self.shape = WanShape(
            config.dim, config.ffn_dim, config.num_layers, config.num_heads, TOKENS, in_channels=config.in_dim,
            out_channels=config.in_dim, freq_dim=config.freq_dim, text_dim=TEXT_DIM,
        )  # fmt: skip

    @torch.inference_mode()
    def velocity(self, call: Call, x: Tensor) -> Tensor:
        *given, store = self.inputs(call, x)
        out = self.model(*given, self._mask(call, x), store)
        if self.model.config.causal_ar and call.kind is not Kind.DENOISE:
            store.commit()
        return self.guided(out)

    def inputs(
        self, call: Call, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, KVStore | KVMemory | FrozenView | None]:
        """What the model is given for a call, branches as one batch (conditional first): latents, noise levels,
        prompt, time positions and the K/V store (None for a model without one)."""
        first, last = call.queries or call.frames
        asked, store = slice(first - call.frames[0], last - call.frames[0]), None
        positions = torch.arange(first, last, device=x.device)
        if call.queries is not None:
            store = self._kept.view(call.queries, call.frames)
        elif self.model.config.causal_ar:
            store = self._open(call.offset + x.shape[2])
            positions = positions + store.begin(call.offset, last - first)
        pair = self._branches_of(call, x, self._told(call, x))
        latents, told = (torch.cat(branches) if self.branches == 2 else branches[0] for branches in pair)
        return latents[:, :, asked], told[:, asked], self.context(call), positions, store

    def context(self, call: Call) -> Tensor:
        """The prompt of a call's segment, ``[branches * B, 64, 64]``."""
        return self._prompts[max(segment for segment in self._prompts if segment <= call.segment)]

    def guided(self, out: Tensor) -> Tensor:
        """Guided velocity ``[B, C, T, H, W]`` of the model's answers, branches as one batch."""
        if self.branches == 1:
            return out.clone()
        conditional, unconditional = out.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    @torch.inference_mode()
    def feature(self, kind: str, call: Call, x: Tensor) -> Tensor:
        model, sigma = self.model, self._told(call, x)
        if kind == "latent":
            return x.transpose(1, 2)
        _, e0 = model.embed_time(sigma)
        if kind == "timestep":
            return e0
        tokens, rotations = model.embed(x, torch.arange(*call.frames, device=x.device))
        if kind == "modulated":
            return model.blocks[0].modulated(tokens, e0).unflatten(1, (x.shape[2], -1))
        context = model.text_embedding(self.context(call)[: len(x)])
        return model.blocks[0](tokens, e0, rotations, context).unflatten(1, (x.shape[2], -1))

    def flops(self, call: Call, frames: int) -> int:
        tokens = self._tokens_per_frame
        if call.queries is None and not self._bounded:
            return self.full_flops(call, frames)
        keys = (call.frames[1] - call.frames[0]) * tokens if call.queries is not None else round(self._store.keys)
        unread = self._store.unread_flops if self._bounded else 0
        return self._batch * self.shape.forward_flops(frames, tokens, keys, branches=self.branches) - unread

    def full_flops(self, call: Call, frames: int) -> int:
        tokens = self._tokens_per_frame
        keys = (call.offset + frames) * tokens if self.model.config.causal_ar else None
        if self._forgetful:
            keys = (call.offset + 2 * frames) * tokens // 2
        return self._batch * self.shape.forward_flops(frames, tokens, keys, branches=self.branches)

    def size(self, frames: int) -> tuple[int, int]:
        """Tokens of a window of ``frames`` latent frames, and how many such windows a guided call forwards (batch
        times branches)."""
        return frames * self._tokens_per_frame, self._batch * self.branches

    def keep(self, frames: int) -> str | None:
        if self._kept is None or self._kept.frames < frames:
            self._kept = FrozenKV(self.model.config.num_layers, frames, self._tokens_per_frame)
        return None

    @property
    def most_frames(self) -> int:
        return self._open(self._rollout).layout.ring if self._bounded else sys.maxsize

    @property
    def kept_bytes(self) -> int:
        kept = self._store if self._bounded else self._kept
        return 0 if kept is None else kept.nbytes

    def lower(self) -> str | None:
        return self._store.lower(self.model.config.block) if isinstance(self._store, KVMemory) else None

    def state(self) -> dict[str, Tensor]:
        return {} if self._store is None else self._store.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._open(self._rollout).load(state)

    def feature_flops(self, kind: str, call: Call, frames: int) -> int:
        if kind == "latent":
            return 0
        count = self.shape.time_flops(frames)
        if kind != "timestep":
            count += self.shape.patch_flops(frames * self._tokens_per_frame)
        if kind == "block0":
            tokens = frames * self._tokens_per_frame
            count += self.shape.block_flops(tokens, tokens) + self.shape.text_flops()
        return self._batch * count

    def sized(self, x: Tensor) -> TinyDenoiser:
        """Remembers the latents' size, which the FLOP count needs; returns itself."""
        self._grid, self._batch, self._element = (
            (x.shape[3] // PATCH, x.shape[4] // PATCH),
            x.shape[0],
            x.element_size(),
        )
        self._tokens_per_frame = _tokens(x)
        return self

    def _told(self, call: Call, x: Tensor) -> Tensor:
        sigmas = on_device(call.sigmas, x.device, torch.float32)
        if self.shares_time and any(call.active):
            sigmas = sigmas.max().expand(len(sigmas))
        return sigmas[None].expand(x.shape[0], -1)

    def _mask(self, call: Call, x: Tensor) -> Tensor | None:
        if not self._chunk:
            return None
        tokens, (first, last) = _tokens(x), call.queries or call.frames
        mask = block_causal_mask(call.frames[1], tokens, self._chunk)
        return mask[first * tokens : last * tokens, call.frames[0] * tokens :]

    def _branches_of(self, call: Call, x: Tensor, told: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Window ``[B, C, T, H, W]`` and noise levels ``[B, T]`` as each of the two branches is given them."""
        if self._hidden is None:
            return (x, x), (told, told)
        other, other_told = self._hidden(call, x, told)
        return (x, other), (told, other_told)

    def _open(self, frames: int) -> KVStore | KVMemory:
        """The store, made at first; ``frames`` of room where nobody said how long the video is."""
        config, frames = self.model.config, self._rollout or frames
        if self._store is None and self._bounded:
            head_dim = config.dim // config.num_heads
            shape = StoreShape(
                config.num_layers, config.num_heads, head_dim, self._grid, self._batch, self._element,
                TimeRotary.of_wan(head_dim),
            )  # fmt: skip
            budget, *attention = self._memory
            self._store = make_memory(
                budget, shape, self.branches, config.block, frames, *attention, forgetful=self._forgetful
            )
        if self._store is None:
            self._store = KVStore(config.num_layers, frames * self._tokens_per_frame)
        return self._store


def _tokens(x: Tensor) -> int:
    return (x.shape[3] // PATCH) * (x.shape[4] // PATCH)
