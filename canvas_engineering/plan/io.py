"""Plan files: a NumPy ``.npz`` archive of the plan's arrays and one JSON header; never a pickle."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canvas_engineering._files import OutputPathError, atomic_write
from canvas_engineering.errors import PlanError

if TYPE_CHECKING:
    from canvas_engineering.plan.plan import BlockSparsePlan

_MAGIC = "canvas-engineering plan"
#: What NumPy, zipfile and json raise on truncated, edited and foreign archives; NotImplementedError and RuntimeError
#: are zipfile's for unknown compression and for encryption.
_DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
_SCALARS = ("num_q", "num_kv", "block_q", "block_kv")


def save_plan(plan: BlockSparsePlan, path: str | Path) -> None:
    """See :meth:`BlockSparsePlan.save`."""
    from canvas_engineering.plan.plan import ARRAY_FIELDS, FORMAT_VERSION

    header = {
        "magic": _MAGIC,
        "version": FORMAT_VERSION,
        "digest": plan.digest,
        "softmax": plan.softmax,
        "source": plan.source,
        "grid": plan.grid,
        "regions": plan.regions,
        **{name: getattr(plan, name) for name in _SCALARS},
    }
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    arrays: dict[str, Any] = {name: getattr(plan, name) for name in ARRAY_FIELDS}
    try:
        with atomic_write(path, binary=True) as file:
            np.savez_compressed(file, header=text, **arrays)
    except OutputPathError as error:
        raise PlanError(str(error)) from error
    except OSError as error:
        raise PlanError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def load_plan(path: str | Path) -> BlockSparsePlan:
    """See :meth:`BlockSparsePlan.load`."""
    from canvas_engineering.plan.plan import ARRAY_FIELDS, FORMAT_VERSION, BlockSparsePlan

    def refuse(why: str, cause: BaseException | None = None) -> PlanError:
        error = PlanError(f"cannot load plan file {str(path)!r}: {why}")
        error.__cause__ = cause
        return error

    try:
        content = io.BytesIO(Path(path).read_bytes())
    except OSError as error:
        raise refuse(error.strerror or str(error), error) from error
    if not zipfile.is_zipfile(content):
        raise refuse("the file is damaged or not a plan (not a zip archive)")
    try:
        with np.load(content, allow_pickle=False) as archive:
            missing = [name for name in ("header", *ARRAY_FIELDS) if name not in archive.files]
            if missing:
                raise refuse(f"not a plan, it lacks {', '.join(missing)}")
            header = json.loads(archive["header"].tobytes())
            arrays = {name: archive[name] for name in ARRAY_FIELDS}
    except PlanError:
        raise
    except _DAMAGE as error:
        raise refuse(f"the file is damaged or not a plan ({error})", error) from error

    if not isinstance(header, dict) or header.get("magic") != _MAGIC:
        raise refuse("the file is not a plan of canvas-engineering")
    if header.get("version") != FORMAT_VERSION:
        raise refuse(f"format version must be {FORMAT_VERSION}, got {header.get('version')!r}")
    try:
        plan = BlockSparsePlan(
            **{name: header[name] for name in _SCALARS},
            softmax=header["softmax"],
            source=str(header["source"]),
            grid=tuple(int(n) for n in header["grid"]),
            regions=tuple((str(name), tuple(int(b) for b in bounds)) for name, bounds in header["regions"]),
            **arrays,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise refuse(f"its header is incomplete ({error!r})", error) from error
    try:
        plan.validate()
    except PlanError as error:
        raise refuse(str(error), error) from error
    if plan.digest != header.get("digest"):
        raise refuse(f"its content was changed: digest {plan.digest[:12]}, recorded {str(header.get('digest'))[:12]}")
    return plan
