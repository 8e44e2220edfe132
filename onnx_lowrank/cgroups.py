"""The CPU time and the memory that Linux control groups, such as those of containers, leave to this process.

Source: kernel documentation, admin-guide/cgroup-v1 and admin-guide/cgroup-v2. A limit of a group holds for
all groups below it, so this module reads the limits of the process's group and of all groups above it. Inside
a container, the path of the process's group may be a path on the host, which is not mounted. Then the mounted
root is the group of the container.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path, PurePosixPath

_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNTS = Path("/sys/fs/cgroup")
_MOUNTS_OF_V2 = (".", "unified")  # "unified" if version 1 has the other mounts


def cpus() -> float:
    """CPU time that the quotas allow, in cores, possibly a fraction; infinite without a quota."""
    quotas = [_first_two(folder / "cpu.max") for folder in _folders("")]
    quotas += [
        (_number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us"))
        for folder in _folders("cpu")
    ]
    known = [(quota, period) for quota, period in quotas if quota is not None and period]
    return min((quota / period for quota, period in known if quota > 0), default=inf)


def free_memory() -> float:
    """Bytes of memory that this process may still take; infinite without a limit.

    The kernel counts cached files as taken memory, but frees them when memory is needed. So this function
    does not count them.
    """
    rooms = [_room(folder, "memory.max", "memory.current", "inactive_file") for folder in _folders("")]
    rooms += [
        _room(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        for folder in _folders("memory")
    ]
    return min(rooms, default=inf)


def _room(folder: Path, limit: str, usage: str, cached: str) -> float:
    most, taken = _number(folder / limit), _number(folder / usage)
    if most is None or taken is None:
        return inf
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == cached and value.isdecimal():
            taken -= int(value)
    return max(0, most - taken)


def _folders(controller: str) -> Iterator[Path]:
    """The folders of the process's group and of all groups above it; "" is version 2's only hierarchy."""
    for line in _text(_MEMBERSHIP).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller not in controllers.split(","):
            continue
        group = PurePosixPath(path)
        # A group outside the namespace appears as "/../group".
        groups = [PurePosixPath("/")] if ".." in group.parts else [group, *group.parents]
        for mount in (controller,) if controller else _MOUNTS_OF_V2:
            yield from (_MOUNTS / mount / one.relative_to("/") for one in groups if one.is_absolute())


def _first_two(path: Path) -> tuple[int | None, int | None]:
    words = _text(path).split()
    numbers = [int(word) if word.isdecimal() else None for word in words]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (None, None)


def _number(path: Path) -> int | None:
    """The number in a file; None if it holds no limit: "max", or -1 for a quota."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
