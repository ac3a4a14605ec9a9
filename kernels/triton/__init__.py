"""Triton kernels: one launch for every softmax set of a plan, forward and backward, on NVIDIA and AMD GPUs.

Importing this package loads neither torch nor triton; ``config`` is plain Python, everything else is
imported by ``backend``.
"""
