"""The blocks of channels in which an execution provider computes."""

from __future__ import annotations

import re
from pathlib import Path

_CPU = "CPUExecutionProvider"
_BLOCKS = {
    "CUDAExecutionProvider": 8,  # tensor cores: halves by eights, TF32 by fours
    "TensorrtExecutionProvider": 4,  # int8: channels of a group by fours
    "NvTensorRTRTXExecutionProvider": 4,
}
_WIDEST = 16
"""Of all providers known, and a multiple of the others: what suits where nothing is known."""

_CPUINFO = Path("/proc/cpuinfo")


def block(provider: str) -> int:
    """How many channels a provider computes at a time: ranks that are multiples of it fill its kernels.

    ONNX Runtime's CPU provider blocks channels by 16 with AVX-512 and on ARM, by 8 on other x86.

    Args:
        provider: Name of an ONNX Runtime execution provider.
    """
    return _cpu_block() if provider == _CPU else _BLOCKS.get(provider, _WIDEST)


def _cpu_block() -> int:
    """16 where nobody tells the instruction set: that is a multiple of 8."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _WIDEST
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return 8 if flags and "avx512f" not in flags[1].split() else _WIDEST
