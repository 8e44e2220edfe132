"""Operators with weights that are never decomposed, and what to do about them."""

from __future__ import annotations

_QUANTIZED = "it is quantized: compress before quantizing"
_FUSED = "it is fused for one runtime: compress the model before that optimization"
_QUANTIZED_BY_RUNTIME = (
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "GatherBlockQuantized",
    "MatMulBnb4",
    "MatMulFpQ4",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "QAttention",
    "QEmbedLayerNormalization",
    "QGemm",
    "QLinearConv",
    "QMoE",
    "QOrderedAttention",
    "QOrderedMatMul",
)

LEFT_ALONE: dict[tuple[str, str], str] = {
    ("", "DeformConv"): "deformable kernels are not decomposed",
    **{("", op): _QUANTIZED for op in ("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger")},
    **{("com.microsoft", op): _QUANTIZED for op in _QUANTIZED_BY_RUNTIME},
    **dict.fromkeys((("com.microsoft.nchwc", "Conv"), ("com.microsoft", "NhwcFusedConv")), _FUSED),
}
"""The reasons, by domain and operator type. A registered family takes precedence over an entry here."""
