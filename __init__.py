"""AR Video Accelerator: ComfyUI nodes that make autoregressive video diffusion faster, without training."""

from __future__ import annotations

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI's loader calls; nothing of ComfyUI is imported before."""
    from .nodes import ARVideoAccelerator

    return ARVideoAccelerator()
