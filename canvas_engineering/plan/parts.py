"""Parts: groups cut so that each part has one softmax slot, rows as atoms and columns as atoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.groups import Group, Pattern
from canvas_engineering.plan.atoms import Atoms, Tokens, partition


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one group that have it in the same slot.

    A row's slot is the number of groups it stands in before this one: a row with ``n`` groups uses slots
    ``0..n-1``, which is the least number of softmax sets possible. A joint softmax has only slot 0.

    Attributes:
        rows, cols: Token ids; equal index sets are the same array object.
        row_atoms: Atoms that the rows consist of.
        slot: Softmax slot.
        weight, connection, pattern: As in the group.
    """

    rows: Tokens
    cols: Tokens
    row_atoms: NDArray[np.int64]
    col_atoms: NDArray[np.int64]
    slot: int
    weight: float
    connection: int
    pattern: Pattern | None


@dataclass(frozen=True, eq=False)
class Parts:
    """All parts of a plan and the atoms they speak of.

    Attributes:
        q_atoms, kv_atoms: The same object when queries and keys are the same tokens.
        num_slots: Softmax slots in use.
    """

    parts: list[Part]
    q_atoms: Atoms
    kv_atoms: Atoms
    num_slots: int
    joint: bool


class _Distinct:
    """Index sets by identity, each with its use (role), in order of appearance."""

    def __init__(self) -> None:
        self.arrays: list[Tokens] = []
        self.roles: list[int] = []
        self._seen: set[tuple[int, int]] = set()

    def add(self, tokens: Tokens, role: int) -> None:
        if (id(tokens), role) not in self._seen:
            self._seen.add((id(tokens), role))
            self.arrays.append(tokens)
            self.roles.append(role)


def _atoms_of(atoms: Atoms, cache: dict[int, NDArray[np.int64]], tokens: Tokens) -> NDArray[np.int64]:
    if id(tokens) not in cache:
        cache[id(tokens)] = atoms.of_set(tokens)
    return cache[id(tokens)]


def make_parts(groups: Sequence[Group], num_q: int, num_kv: int, *, joint: bool, same_tokens: bool) -> Parts:
    """Partition the tokens and give every row of every group its softmax slot.

    Args:
        groups: The groups, all with non-empty rows and columns.
        num_q, num_kv: Number of query and key tokens.
        joint: One softmax per row over everything.
        same_tokens: Queries and keys are the same tokens and share one order.
    """
    rows, cols = _Distinct(), _Distinct()
    for group in groups:
        rows.add(group.rows, 2 * group.connection)
        (rows if same_tokens else cols).add(group.cols, 2 * group.connection + 1)
    q_atoms = partition(num_q, rows.arrays, rows.roles)
    kv_atoms = q_atoms if same_tokens else partition(num_kv, cols.arrays, cols.roles)
    row_cache: dict[int, NDArray[np.int64]] = {}
    col_cache = row_cache if same_tokens else {}

    used = np.zeros(q_atoms.count, np.int64)  # groups each atom stands in so far
    parts: list[Part] = []
    split_rows: dict[tuple[int, bytes], Tokens] = {}
    for group in groups:
        row_atoms = _atoms_of(q_atoms, row_cache, group.rows)
        col_atoms = _atoms_of(kv_atoms, col_cache, group.cols)
        slots = np.zeros(row_atoms.size, np.int64) if joint else used[row_atoms]
        used[row_atoms] += 1
        distinct_slots = np.unique(slots)
        for slot in distinct_slots:
            if distinct_slots.size == 1:
                part_rows, part_atoms, pattern = group.rows, row_atoms, group.pattern
            else:
                part_atoms = row_atoms[slots == slot]
                key = (id(group.rows), part_atoms.tobytes())
                mine = np.isin(q_atoms.of_token[group.rows], part_atoms)
                if key not in split_rows:
                    split_rows[key] = group.rows[mine]
                part_rows = split_rows[key]
                pattern = None
                if group.pattern is not None:
                    pattern = group.pattern.restrict(np.flatnonzero(mine), slice(None))
            parts.append(
                Part(
                    part_rows,
                    group.cols,
                    part_atoms,
                    col_atoms,
                    int(slot),
                    group.weight,
                    group.connection,
                    pattern,
                )
            )
    num_slots = 0 if not parts else 1 + max(part.slot for part in parts)
    return Parts(parts, q_atoms, kv_atoms, num_slots, joint)
