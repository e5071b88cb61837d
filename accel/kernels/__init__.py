"""Triton kernels, each beside the plain-torch form that specifies it.

An operation ``x`` is two modules. ``x.py`` has the torch form, ``supports`` and the public function, a
``choose.Kernel`` that picks one of them at run time. ``x_triton.py`` has the device code as plain functions, imports
Triton and is itself imported by ``x.py`` when a kernel is about to run; ``choose.jitted`` makes them launchable, on a
GPU or in Triton's interpreter.
"""
