"""Training-free acceleration of autoregressive video diffusion.

A library on torch, numpy and einops that never imports ComfyUI. The floors, ground first: ``schedule`` (when each
latent frame is denoised), ``call`` (what a model call is), ``timeline`` (what happened), ``signals``, ``policy``,
``history``, ``predict`` and ``correct`` (whether and how to skip a call), ``engine`` (one run) and ``sampling`` (the
segment loops).
"""
