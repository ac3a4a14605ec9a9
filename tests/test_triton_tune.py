"""The search for the fastest configurations, with invented measurements; and real ones, under the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from canvas_engineering.kernels.triton import config, tune
from canvas_engineering.kernels.triton.config import (
    KernelConfig,
    Key,
    Table,
    Tile,
    kernel_config,
    read_table,
    tuned_table_path,
)
from canvas_engineering.kernels.triton.tune import CandidateError, KernelJob, TileJob, make_jobs, resume

DEVICE = "NVIDIA Example 100"
SOURCE = "a test"


pytestmark = pytest.mark.usefixtures("kernel_table_cache")


class Invented:
    """Seconds from a rule: ``favourite`` is the fastest, ``broken`` cannot be used.

    ``stop_after`` measurements it is interrupted, as by Ctrl-C.
    """

    def __init__(self, stop_after: int | None = None) -> None:
        self.kernels: list[tuple[Key, KernelConfig]] = []
        self.tiles: list[Tile] = []
        self.stop_after = stop_after

    def kernel(self, key: Key, config: KernelConfig) -> float:
        if self.stop_after is not None and len(self.kernels) >= self.stop_after:
            raise KeyboardInterrupt
        self.kernels.append((key, config))
        if config.num_stages == 3:
            raise CandidateError("OutOfResources")
        return 1e-3 / config.num_warps + 1e-6 * config.other_block(key.kernel)

    def tile(self, tile: Tile) -> float:
        self.tiles.append(tile)
        if tile.block_kv == 16:
            raise CandidateError("wrong results")
        return 0.25 if tile.block_q == 64 and tile.block_kv == 32 else 0.5


def empty() -> Table:
    return Table("sm_90", SOURCE, {})


def jobs_of(head_dim: int = 64) -> list[tune.Job]:
    return make_jobs("sm_90", [head_dim], ["float16"])


# -- jobs ---------------------------------------------------------------------------------------------------


def test_jobs_name_every_entry_and_the_tile_sizes_after_their_kernels() -> None:
    jobs = make_jobs("sm_90", [64, 128], ["float16", "float32"])
    tiles = [job for job in jobs if isinstance(job, TileJob)]
    assert [(job.head_dim, job.dtype) for job in tiles] == [
        (64, "float16"),
        (128, "float16"),
        (64, "float32"),
        (128, "float32"),
    ]
    for job in tiles:
        place = jobs.index(job)
        mine = [
            other.key
            for other in jobs[:place]
            if isinstance(other, KernelJob) and (other.key.head_dim, other.key.dtype) == (job.head_dim, job.dtype)
        ]
        assert {key.kernel for key in mine} == set(config.KERNELS)
        assert {key.sets for key in mine} == set(config.SETS)
    assert len({str(job) for job in jobs}) == len(jobs)


def test_the_shipped_configuration_is_measured_first_and_no_candidate_twice() -> None:
    shipped = config.shipped_table("sm_90").kernels
    for job in jobs_of():
        if isinstance(job, KernelJob):
            assert len(set(job.configs)) == len(job.configs) == job.size > 4
            assert all(candidate.own_block(job.key.kernel) == job.key.own_block for candidate in job.configs)
            if job.key in shipped:
                assert job.configs[0] == shipped[job.key]


# -- the search ---------------------------------------------------------------------------------------------


def test_the_fastest_usable_candidate_is_kept_and_used() -> None:
    measure = Invented()
    outcome = tune.tune(jobs_of(), measure, DEVICE, empty())
    table = read_table(tuned_table_path(DEVICE))
    keys = {job.key for job in jobs_of() if isinstance(job, KernelJob)}
    assert set(table.kernels) == keys == {entry.key for entry in outcome.entries}
    for key, found in table.kernels.items():
        usable = [c for k, c in measure.kernels if k == key and c.num_stages != 3]
        assert found == min(usable, key=lambda c: 1e-3 / c.num_warps + 1e-6 * c.other_block(key.kernel))
    assert outcome.measured == len([c for _, c in measure.kernels if c.num_stages != 3]) + 12
    assert outcome.failures == {
        "OutOfResources": len([c for _, c in measure.kernels if c.num_stages == 3]),
        "wrong results": 4,
    }
    assert outcome.skipped == sum(outcome.failures.values())
    assert not outcome.hopeless
    # Already in this process, without another call.
    entry = table.kernels[Key("forward", 64, "float16", "many", 128)]
    assert entry != config.shipped_table("sm_90").kernels[Key("forward", 64, "float16", "many", 128)]
    found = kernel_config(
        "sm_90", "forward", 64, "bfloat16", many_sets=True, block_q=128, block_kv=128, device_name=DEVICE
    )
    assert found == entry


def test_tile_speeds_are_relative_to_the_fastest() -> None:
    outcome = tune.tune([TileJob(64, "float16")], Invented(), DEVICE, empty())
    stored = read_table(tuned_table_path(DEVICE)).tiles
    assert stored == outcome.tiles
    assert len(stored) == 12  # without those that cannot be used
    assert stored[Tile(64, "float16", 64, 32)] == 1.0
    assert set(stored.values()) == {1.0, 0.5}
    assert config.recommended_tiles("sm_90", 64, "float16", DEVICE)[64, 32] == 1.0


def test_an_entry_without_a_usable_candidate_is_named_and_not_stored() -> None:
    key = Key("forward", 64, "float16", "one", 64)
    job = KernelJob(key, (KernelConfig(64, 64, 4, 3), KernelConfig(64, 32, 4, 3)))
    outcome = tune.tune([job], Invented(), DEVICE, empty())
    assert outcome.hopeless == ["forward 64 float16 one 64"]
    assert outcome.failures == {"OutOfResources": 2}
    assert not read_table(tuned_table_path(DEVICE)).kernels


def test_other_errors_of_a_measurement_are_not_swallowed() -> None:
    class Broken(Invented):
        def kernel(self, key: Key, config: KernelConfig) -> float:
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.tune(jobs_of(), Broken(), DEVICE, empty())


def test_an_interrupted_search_goes_on_where_it_stopped() -> None:
    jobs = jobs_of()
    first = Invented(stop_after=jobs[0].size + jobs[1].size + 2)  # in the middle of the third entry
    with pytest.raises(KeyboardInterrupt):
        tune.tune(jobs, first, DEVICE, empty())
    written = resume(tuned_table_path(DEVICE), "sm_90", SOURCE, again=False)
    assert len(written.kernels) == 2  # what was finished
    unfinished = first.kernels[-1][0]
    assert unfinished not in written.kernels

    second = Invented()
    outcome = tune.tune(jobs, second, DEVICE, resume(tuned_table_path(DEVICE), "sm_90", SOURCE, again=False))
    assert outcome.kept == len(written.kernels)
    assert not {key for key, _ in second.kernels} & set(written.kernels)
    assert {key for key, _ in second.kernels} | set(written.kernels) == {
        job.key for job in jobs if isinstance(job, KernelJob)
    }

    third = Invented()
    outcome = tune.tune(jobs, third, DEVICE, resume(tuned_table_path(DEVICE), "sm_90", SOURCE, again=False))
    assert (outcome.kept, outcome.measured, third.kernels, third.tiles) == (len(jobs), 0, [], [])


def test_results_of_another_version_and_again_are_measured_anew() -> None:
    tune.tune(jobs_of()[:2], Invented(), DEVICE, empty())
    path = tuned_table_path(DEVICE)
    assert len(resume(path, "sm_90", SOURCE, again=False).kernels) == 2
    assert not resume(path, "sm_90", "another version", again=False).kernels
    assert not resume(path, "sm_90", SOURCE, again=True).kernels
    assert not resume(path.with_name("missing.json"), "sm_90", SOURCE, again=False).kernels


def test_the_budget_ends_the_search_between_entries() -> None:
    measure = Invented()
    jobs = jobs_of()
    outcome = tune.tune(jobs, measure, DEVICE, empty(), budget=20.0, clock=lambda: float(len(measure.kernels)))
    finished = {key for key, _ in measure.kernels}
    assert {entry.key for entry in outcome.entries} == finished
    assert 20 <= len(measure.kernels) < 20 + max(job.size for job in jobs)
    assert outcome.left == len(jobs) - len(finished) > 0


def test_progress_counts_every_candidate_once() -> None:
    jobs = jobs_of()
    seen: list[int] = []
    tune.tune(jobs, Invented(), DEVICE, empty(), progress=lambda candidates, job: seen.append(candidates))
    assert sum(seen) == sum(job.size for job in jobs)
    known = resume(tuned_table_path(DEVICE), "sm_90", SOURCE, again=False)
    seen.clear()
    tune.tune(jobs, Invented(), DEVICE, known, progress=lambda candidates, job: seen.append(candidates))
    assert sum(seen) == sum(job.size for job in jobs)


def test_an_export_is_a_whole_table_with_the_measurements_in_it(tmp_path: Path) -> None:
    tune.tune(jobs_of(), Invented(), DEVICE, empty())
    measured = read_table(tuned_table_path(DEVICE))
    path = tmp_path / "sm_90.json"
    tune.export(path, "sm_90", measured)
    exported, shipped = read_table(path), config.shipped_table("sm_90")
    assert (exported.architecture, exported.source) == ("sm_90", SOURCE)
    assert set(exported.kernels) == set(shipped.kernels) | set(measured.kernels)
    for key, entry in exported.kernels.items():
        assert entry == measured.kernels.get(key, shipped.kernels.get(key))
    assert exported.tiles == measured.tiles


# -- measuring ----------------------------------------------------------------------------------------------

# In a process of its own: whether kernels are interpreted is settled when triton is first imported.
WORKER = """
import torch
from canvas_engineering.cli.tune import expect
from canvas_engineering.kernels.triton.config import KERNELS, KernelConfig, Key, Tile
from canvas_engineering.kernels.triton.measure import GpuMeasure, tuning_plan
from canvas_engineering.kernels.triton.tune import CandidateError

for many_sets in (False, True):
    plan = tuning_plan(32, 64, many_sets=many_sets, tokens=256)
    plan.validate()
    assert plan.max_sets == (4 if many_sets else 1)
    assert 0 < (plan.entry_mask >= 0).sum() < plan.entry_mask.size

launches = []
def timer(call):
    launches.append(call())
    return 0.125

def measure(expect):
    return GpuMeasure(torch.device("cpu"), expect, timer, tokens=128, heads=2)

right = measure(expect)
for kernel, sets, dtype in zip(KERNELS, ("many", "one", "many"), ("float16", "float16", "float32")):
    key = Key(kernel, 16, dtype, sets, 32)
    assert right.kernel(key, KernelConfig.of(kernel, 32, 32, 4, 1)) == 0.125
# Blocks of 16 keys in a tile of 128: half a word of a mask.
assert right.kernel(Key("forward", 16, "float16", "many", 32), KernelConfig(32, 16, 4, 1)) == 0.125
assert right.tile(Tile(16, "float16", 32, 64)) == 0.125
assert len(launches) == 5

def shifted(*arguments):
    return {name: (array + 2 * allowed, allowed) for name, (array, allowed) in expect(*arguments).items()}

for kernel in KERNELS:
    try:
        measure(shifted).kernel(Key(kernel, 16, "float16", "one", 32), KernelConfig.of(kernel, 32, 32, 4, 1))
    except CandidateError as error:
        assert str(error) == "wrong results"
    else:
        raise SystemExit(f"{kernel}: wrong results were timed")
assert len(launches) == 5
"""


def test_measurements_compare_before_they_time() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
