"""Which trajectories stand beside each other: the same prompt, decoded in several ways."""

from __future__ import annotations

from collections.abc import Sequence

from ..trajectory import Trajectory


def group_numbers(trajectories: Sequence[Trajectory]) -> list[int]:
    """Of each trajectory, the number of its group: 0, 1, ... ascending.

    Neighbours are of one group if they have the same prompt and different titles; a trajectory
    without a title stands alone.
    """
    numbers: list[int] = []
    members: list[Trajectory] = []
    for one in trajectories:
        apart = (
            one.title is None
            or not members
            or members[0].title is None
            or members[0].prompt != one.prompt
            or any(member.title == one.title for member in members)
        )
        if apart:
            members = []
        numbers.append((numbers[-1] if numbers else -1) + apart)
        members.append(one)
    return numbers


def grouped(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """The trajectories of each group, in order."""
    groups: list[list[Trajectory]] = []
    for number, one in zip(group_numbers(trajectories), trajectories, strict=True):
        if number == len(groups):
            groups.append([])
        groups[number].append(one)
    return groups
