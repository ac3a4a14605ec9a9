"""Parts: groups cut so that each part has one softmax slot, rows as atoms and columns as atoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
        rows, cols: Token ids.
        row_set, col_set: Index into ``Parts.row_sets``, ``Parts.col_sets``: equal sets have equal numbers.
        slot: Softmax slot.
        weight, connection, pattern: As in the group.
    """

    rows: Tokens
    cols: Tokens
    row_set: int
    col_set: int
    slot: int
    weight: float
    connection: int
    pattern: Pattern | None


@dataclass(frozen=True, eq=False)
class IndexSets:
    """Several index sets in one array: set ``number[i]`` holds ``tokens[i]``."""

    count: int
    number: NDArray[np.int64]
    tokens: Tokens

    @classmethod
    def of(cls, sets: list[Tokens]) -> IndexSets:
        number = np.repeat(np.arange(len(sets)), [tokens.size for tokens in sets])
        return cls(len(sets), number, np.concatenate(sets) if sets else np.zeros(0, np.int64))


@dataclass(frozen=True, eq=False)
class Parts:
    """All parts of a plan and the atoms they speak of.

    Attributes:
        q_atoms, kv_atoms: The same object when queries and keys are the same tokens.
        num_slots: Softmax slots in use.
        row_sets, col_sets: The distinct index sets of the parts' rows and columns.
    """

    parts: list[Part]
    row_sets: list[Tokens]
    col_sets: list[Tokens]
    q_atoms: Atoms
    kv_atoms: Atoms
    num_slots: int
    joint: bool

    @cached_property
    def flat_rows(self) -> IndexSets:
        return IndexSets.of(self.row_sets)

    @cached_property
    def flat_cols(self) -> IndexSets:
        return IndexSets.of(self.col_sets)


class _Uses:
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


class _Numbering:
    """Numbers index sets by identity."""

    def __init__(self) -> None:
        self.arrays: list[Tokens] = []
        self._number: dict[int, int] = {}

    def of(self, tokens: Tokens) -> int:
        if id(tokens) not in self._number:
            self._number[id(tokens)] = len(self.arrays)
            self.arrays.append(tokens)
        return self._number[id(tokens)]


def make_parts(groups: Sequence[Group], num_q: int, num_kv: int, *, joint: bool, same_tokens: bool) -> Parts:
    """Partition the tokens and give every row of every group its softmax slot.

    Args:
        groups: The groups, all with non-empty rows and columns.
        num_q, num_kv: Number of query and key tokens.
        joint: One softmax per row over everything.
        same_tokens: Queries and keys are the same tokens and share one order.
    """
    rows, cols = _Uses(), _Uses()
    for group in groups:
        rows.add(group.rows, 2 * group.connection)
        (rows if same_tokens else cols).add(group.cols, 2 * group.connection + 1)
    q_atoms = partition(num_q, rows.arrays, rows.roles)
    kv_atoms = q_atoms if same_tokens else partition(num_kv, cols.arrays, cols.roles)
    atoms_of_rows: dict[int, NDArray[np.int64]] = {}
    used = np.zeros(q_atoms.count, np.int64)  # groups each atom stands in so far
    parts: list[Part] = []
    split_rows: dict[tuple[int, bytes], Tokens] = {}
    row_sets, col_sets = _Numbering(), _Numbering()
    for group in groups:
        if id(group.rows) not in atoms_of_rows:
            atoms_of_rows[id(group.rows)] = q_atoms.of_set(group.rows)
        row_atoms = atoms_of_rows[id(group.rows)]
        slots = np.zeros(row_atoms.size, np.int64) if joint else used[row_atoms]
        used[row_atoms] += 1
        distinct_slots = np.unique(slots)
        for slot in distinct_slots:
            rows_here, pattern = group.rows, group.pattern
            if distinct_slots.size > 1:
                atoms_here = row_atoms[slots == slot]
                mine = np.isin(q_atoms.of_token[group.rows], atoms_here)
                rows_here = split_rows.setdefault((id(group.rows), atoms_here.tobytes()), group.rows[mine])
                if pattern is not None:
                    pattern = pattern.restrict(np.flatnonzero(mine), slice(None))
            parts.append(
                Part(
                    rows=rows_here,
                    cols=group.cols,
                    row_set=row_sets.of(rows_here),
                    col_set=col_sets.of(group.cols),
                    slot=int(slot),
                    weight=group.weight,
                    connection=group.connection,
                    pattern=pattern,
                )
            )
    num_slots = 0 if not parts else 1 + max(part.slot for part in parts)
    return Parts(parts, row_sets.arrays, col_sets.arrays, q_atoms, kv_atoms, num_slots, joint)
