"""What providers compute in, on machines that are only pretended."""

import pytest

from onnx_lowrank import hardware

X86 = "processor : 0\nflags\t\t: fpu sse2 {} avx2\nprocessor : 1\nflags\t\t: fpu sse2 {} avx2\n"


@pytest.mark.parametrize(
    ("text", "block"),
    [
        (X86.format("avx512f", "avx512f"), 16),
        (X86.format("avx512fp16x", "bmi1"), 8),
        ("processor : 0\nFeatures : fp asimd\n", 16),
        ("", 16),
    ],
)
def test_the_cpu_provider_follows_the_instruction_set(monkeypatch, tmp_path, text, block):
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(text)
    assert hardware.block("CPUExecutionProvider") == block


def test_a_system_that_does_not_tell_gets_what_suits_all(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "none")
    assert hardware.block("CPUExecutionProvider") == 16


@pytest.mark.parametrize(
    ("provider", "block"),
    [("CUDAExecutionProvider", 8), ("TensorrtExecutionProvider", 4), ("QNNExecutionProvider", 16)],
)
def test_other_providers(provider, block):
    assert hardware.block(provider) == block
