"""Pallas TPU kernels, and the mask metadata that JAX's Splash attention kernel reads.

Nothing is imported here: ``mask_info`` needs NumPy only, everything else in this package needs JAX.
"""
