"""The processors and memory of this machine, and the blocks of channels in which providers compute."""

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
    "CUDAExecutionProvider": 8,  # tensor cores compute 8 channels at a time in float16, 4 in TF32
    "TensorrtExecutionProvider": 4,  # int8 kernels compute 4 channels of a group at a time
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
    """The number of channels that a provider computes at a time; its multiples, as ranks, fill the kernels.

    ONNX Runtime's CPU provider computes 16 channels at a time with AVX-512 and on ARM, and 8 on other x86.

    Args:
        provider: Name of an ONNX Runtime execution provider.
    """
    return _cpu_block() if provider == _CPU else _BLOCKS.get(provider, _WIDEST)


def has_blocked_layout(provider: str) -> bool:
    """Whether a provider computes convolutions in ONNX Runtime's blocked layout (`allocate.layout`).

    Args:
        provider: Name of an ONNX Runtime execution provider.
    """
    return provider == _CPU


def processor(provider: str) -> str:
    """The hardware of a provider: the CPU with its number of cores, and for GPU providers the GPUs."""
    return f"{processor_kind(provider)}, {cores()} cores"


def processor_kind(provider: str) -> str:
    """The same without the number of cores, which changes times and no results."""
    return _cpu() if provider == _CPU else f"{_gpus()} {_cpu()}".strip()


def cores() -> int:
    """Number of CPU cores that this process may use, by its affinity and by its control groups' CPU time."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroups.cpus()
    return usable if quota >= usable else max(1, ceil(quota))


def free_memory() -> int:
    """Approximate bytes of memory that this process may still take; the machine's total if unknown."""
    free = re.search(r"^MemAvailable:\s*(\d+) kB$", _text(_MEMINFO), re.MULTILINE)
    if free:
        known = int(free[1]) << 10
    elif hasattr(os, "sysconf"):
        known = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        known = _USUAL_MEMORY
    return int(min(known, cgroups.free_memory()))


def cache_bytes() -> int:
    """Bytes of the largest cache of this machine, including shared ones; a usual size if it is unknown."""
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
    return model[1] if model else platform.processor() or "unknown"


def _gpus() -> str:
    """The GPUs that NVIDIA's driver lists; empty without the driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(listed.stdout.decode(errors="replace").splitlines())


def _cpu_block() -> int:
    """The block of the CPU provider; 16 if the instruction set is unknown, since 16 is a multiple of 8."""
    flags = re.search(r"^flags\s*:(.*)$", _text(_CPUINFO), re.MULTILINE)
    return 8 if flags and "avx512f" not in flags[1].split() else _WIDEST


def _text(path: Path) -> str:
    """The text of a file of the kernel; empty if there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
