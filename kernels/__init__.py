"""The attention kernels, one folder per backend: reference, portable, triton, pallas.

The folder lies at the top of the repository and is imported as ``canvas_engineering.kernels``, through the
symlink of that name. The backends never import one another.
"""

if __name__ == "kernels":
    raise ImportError(
        "the kernels of canvas-engineering are imported as 'canvas_engineering.kernels', not as 'kernels', which "
        "is another project on PyPI. This folder was found because the repository's root is on sys.path."
    )
