"""What computes: the processors of this machine, and the blocks of channels in which providers compute."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from math import ceil
from pathlib import Path

from onnx_lowrank import cgroups

_CPU = "CPUExecutionProvider"
_BLOCKS = {
    "CUDAExecutionProvider": 8,  # tensor cores: halves by eights, TF32 by fours
    "TensorrtExecutionProvider": 4,  # int8: channels of a group by fours
    "NvTensorRTRTXExecutionProvider": 4,
}
_WIDEST = 16
"""The block of an unknown provider: the largest of the known ones, and a multiple of the others."""

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_SHIFTS = {"K": 10, "M": 20, "G": 30}
_USUAL_CACHE = 16 * 2**20
_USUAL_MEMORY = 4 * 2**30
_PATIENCE = 10.0  # seconds


def block(provider: str) -> int:
    """How many channels a provider computes at a time: ranks that are multiples of it fill its kernels.

    ONNX Runtime's CPU provider blocks channels by 16 with AVX-512 and on ARM, by 8 on other x86.

    Args:
        provider: Name of an ONNX Runtime execution provider.
    """
    return _cpu_block() if provider == _CPU else _BLOCKS.get(provider, _WIDEST)


def processor(provider: str) -> str:
    """What a provider computes on: the CPU with the number of its cores, and GPUs if it is for those."""
    return _cpu() if provider == _CPU else f"{_gpus()} {_cpu()}".strip()


def cores() -> int:
    """CPU cores that this process may use: by its affinity, and by the CPU time of its control groups."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroups.cpus()
    return usable if quota >= usable else max(1, ceil(quota))


def free_memory() -> int:
    """Bytes of memory that this process may still take, about; all of the machine's where nobody tells."""
    free = re.search(r"^MemAvailable:\s*(\d+) kB$", _text(_MEMINFO), re.MULTILINE)
    if free:
        known = int(free[1]) << 10
    elif hasattr(os, "sysconf"):
        known = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        known = _USUAL_MEMORY
    return int(min(known, cgroups.free_memory()))


def cache_bytes() -> int:
    """Size of the largest cache of this machine, shared ones included; a usual one where unknown."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        try:
            size = re.fullmatch(r"(\d+)([KMG])", path.read_text(encoding="ascii").strip())
        except (OSError, ValueError):
            continue
        if size:
            sizes.append(int(size[1]) << _SHIFTS[size[2]])
    return max(sizes, default=_USUAL_CACHE)


def _cpu() -> str:
    model = re.search(r"^model name\s*:\s*(.*)$", _text(_CPUINFO), re.MULTILINE)
    return f"{model[1] if model else platform.processor() or 'unknown'}, {cores()} cores"


def _gpus() -> str:
    """The GPUs that NVIDIA's driver lists; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(listed.stdout.splitlines())


def _cpu_block() -> int:
    """16 where nobody tells the instruction set: that is a multiple of 8."""
    flags = re.search(r"^flags\s*:(.*)$", _text(_CPUINFO), re.MULTILINE)
    return 8 if flags and "avx512f" not in flags[1].split() else _WIDEST


def _text(path: Path) -> str:
    """What a file of the kernel tells; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
