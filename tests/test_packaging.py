"""What users install: sdist and wheel are built, the wheel is installed elsewhere and imported there."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter outside the repository, so that only installed files can be imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built from a copy of the tracked files."""
    work = tmp_path_factory.mktemp("build")
    source = work / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for folder in ("canvas_engineering", "kernels"):
        shutil.copytree(
            ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    assert (source / "canvas_engineering" / "kernels").is_symlink()
    # The wheel is built from the unpacked sdist: what the sdist lacks, the wheel lacks.
    done = python("-m", "build", "--no-isolation", "--outdir", str(work / "dist"), str(source), cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    return work / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def python_files(folder: Path) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in folder.rglob("*.py")}


def test_wheel_has_one_top_level_name_and_every_module_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"canvas_engineering"}
    assert max(Counter(names).values()) == 1
    expected = {f"canvas_engineering/{name}" for name in python_files(ROOT / "kernels")} | {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "canvas_engineering").glob("**/*.py")
        if "kernels" not in path.relative_to(ROOT / "canvas_engineering").parts[:1]
    }
    assert {name for name in names if name.endswith(".py")} == expected
    assert "canvas_engineering/py.typed" in names
    tables = {f"canvas_engineering/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.json")}
    assert {name for name in names if name.endswith(".json")} == tables


def test_every_folder_with_modules_is_a_package() -> None:
    # setuptools leaves out a folder without __init__.py, and tools take kernels/triton for the real triton.
    for folder in ("canvas_engineering", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"


def test_sdist_holds_the_sources_once(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = ["/".join(member.name.split("/")[1:]) for member in archive.getmembers() if member.isfile()]
    assert "LICENSE" in names
    assert "canvas_engineering/kernels/__init__.py" in names
    assert not [name for name in names if name.startswith("kernels/")]


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(path))
    assert metadata["Name"] == "canvas-engineering"
    assert metadata["Version"] == "0.6.0"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == {"torch", "triton", "jax", "tpu", "viz", "dev", "all"}
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line.split(">")[0].strip() for line in required] == ["numpy"]


def test_installed_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    done = python(
        "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    code = (
        "import canvas_engineering, canvas_engineering.kernels as kernels\n"
        "from canvas_engineering import BlockSparsePlan, CanvasLayout, CanvasTopology\n"
        "layout = CanvasLayout(T=2, H=4, W=4, d_model=8, regions={'a': (0, 2, 0, 4, 0, 4)})\n"
        "plan = BlockSparsePlan.from_topology(CanvasTopology.isolated(['a']), layout)\n"
        "print(plan.stats().true_pairs, canvas_engineering.__file__, kernels.__file__, sep='\\n')\n"
    )
    # An isolated interpreter does not see the editable installation, nor the working folder.
    site = (
        f"import sys; sys.path = [{str(target)!r}] + [p for p in sys.path if p]; "
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', str(f))]\n"
    )
    done = python("-I", "-c", site + code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pairs, package, kernels = done.stdout.split()
    assert pairs == "1024"
    assert Path(package).is_relative_to(target)
    assert Path(kernels).is_relative_to(target / "canvas_engineering")
    assert (target / "bin" / "canvas-engineering").exists() or (target / "Scripts").exists()


def test_kernels_refuse_their_plain_name() -> None:
    done = python("-c", "import kernels", cwd=ROOT)
    assert done.returncode != 0
    assert "imported as 'canvas_engineering.kernels', not as 'kernels'" in done.stderr


def test_kernels_are_a_symlink_in_the_repository() -> None:
    link = ROOT / "canvas_engineering" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
