"""Pallas TPU kernels, and the mask metadata that JAX's Splash attention kernel reads.

Nothing is imported here: ``mask_info``, ``lowering``, ``tiles`` and ``schedule`` need NumPy only, everything else JAX.
"""
