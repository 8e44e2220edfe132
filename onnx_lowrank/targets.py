"""The rules of runtimes and accelerators for the operators that they run well, in one table.

A target stands for options, and an option of the user takes the place of the target's. The rules have no
effect on what a model computes; docs/targets.md explains them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx_lowrank.core.option import Style
from onnx_lowrank.errors import InputError


@dataclass(frozen=True, slots=True)
class Target:
    """The rules of one target.

    Attributes:
        align: As the option `align`; None keeps to the blocked layout of ONNX Runtime's CPU provider.
        styles: As the option `lowering`.
        engine: As the option `engine`.
        sources: The pages that state the rules, one for each rule.
    """

    align: int | None = None
    styles: tuple[Style, ...] = ()
    engine: str | None = None
    sources: tuple[str, ...] = ()


_NVIDIA = "https://docs.nvidia.com/deeplearning/performance/dl-performance-convolutional/index.html"
_ONNXRUNTIME = "https://github.com/microsoft/onnxruntime"
_QUALCOMM = "https://docs.qualcomm.com/doc/80-63442-10/topic"

TARGETS: Mapping[str, Target] = {
    # Blocks of 8 or 16 channels; their rules are in allocate/layout.py.
    "cpu": Target(sources=(f"{_ONNXRUNTIME}/blob/main/onnxruntime/core/optimizer/nchwc_transformer.cc",)),
    # Channels divisible by 8 in float16, by 4 in TF32.
    "cuda": Target(align=8, sources=(_NVIDIA,)),
    # The float16 formats of tensor cores hold multiples of 8 channels.
    "tensorrt": Target(align=8, sources=(_NVIDIA, "https://github.com/NVIDIA/TensorRT/issues/3876")),
    # oneDNN stores blocks of 8 or 16 channels; of many groups, each fills less than a block.
    "openvino": Target(
        align=8,
        styles=(Style.GROUP_FREE,),
        engine="openvino",
        sources=("https://uxlfoundation.github.io/oneDNN/dev_guide_understanding_memory_formats.html",),
    ),
    # Vectors of 4 channels; grouped convolutions have a shader of their own.
    "webgpu": Target(
        align=4,
        styles=(Style.GROUP_FREE,),
        sources=(f"{_ONNXRUNTIME}/pull/17717", f"{_ONNXRUNTIME}/pull/21892", f"{_ONNXRUNTIME}/pull/32252"),
    ),
    # Channels are rounded up to multiples of 32, so groups of few channels are mostly padding.
    "qnn": Target(
        align=32,
        styles=(Style.GROUP_FREE,),
        sources=(f"{_QUALCOMM}/htp_guidelines_low_depth_activations.html",),
    ),
    # Four axes with channels first, and convolutions in place of matrix products.
    "coreml": Target(
        align=1,
        styles=(Style.CONV,),
        sources=("https://machinelearning.apple.com/research/neural-engine-transformers",),
    ),
}


def named(name: str | None) -> Target:
    """The target with this name; None has no rules.

    Raises:
        InputError: No target has this name.
    """
    if name is None:
        return Target()
    if name not in TARGETS:
        raise InputError(f"There is no target {str(name)[:60]!r}: choose one of {', '.join(TARGETS)}.")
    return TARGETS[name]
