"""What providers compute in, on machines that are only pretended."""

import subprocess

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


# --- processors and caches --------------------------------------------------------------------------

NAMED = "processor : 0\nmodel name\t: Some CPU @ 3 GHz\nflags : fpu\nprocessor : 1\nmodel name : Another\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of two cores, with what it tells of its processor and of its GPUs."""
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(hardware, "_CACHES", tmp_path / "cache")
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(hardware.platform, "processor", lambda: "arm")
    monkeypatch.setattr(hardware.shutil, "which", lambda tool: None)

    def machine(cpuinfo=None, gpus=None):
        if cpuinfo is not None:
            (tmp_path / "cpuinfo").write_text(cpuinfo)
        if gpus is None:
            return
        monkeypatch.setattr(hardware.shutil, "which", lambda tool: "/bin/" + tool)

        def run(command, **_):
            if isinstance(gpus, Exception):
                raise gpus
            return subprocess.CompletedProcess(command, 0, gpus, "")

        monkeypatch.setattr(hardware.subprocess, "run", run)

    return machine


@pytest.mark.parametrize(
    ("cpuinfo", "told"),
    [
        (NAMED, "Some CPU @ 3 GHz, 2 cores"),
        ("processor : 0\nFeatures : fp asimd\n", "arm, 2 cores"),
        ("", "arm, 2 cores"),
        (None, "arm, 2 cores"),
    ],
)
def test_a_processor_is_told_by_its_name_and_its_cores(machine, cpuinfo, told):
    machine(cpuinfo)
    assert hardware.processor("CPUExecutionProvider") == told


def test_a_processor_without_any_name(machine, monkeypatch):
    machine()
    monkeypatch.setattr(hardware.platform, "processor", lambda: "")
    assert hardware.processor("CPUExecutionProvider") == "unknown, 2 cores"


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        (None, "Some CPU @ 3 GHz, 2 cores"),
        ("", "Some CPU @ 3 GHz, 2 cores"),
        ("H100, 550.1\n", "H100, 550.1 Some CPU @ 3 GHz, 2 cores"),
        ("A, 1\nB, 1\n", "A, 1; B, 1 Some CPU @ 3 GHz, 2 cores"),
        (OSError("no"), "Some CPU @ 3 GHz, 2 cores"),
        (subprocess.TimeoutExpired("nvidia-smi", 10), "Some CPU @ 3 GHz, 2 cores"),
        (subprocess.CalledProcessError(9, "nvidia-smi"), "Some CPU @ 3 GHz, 2 cores"),
    ],
)
def test_gpus_are_told_where_they_compute(machine, provider, gpus, told):
    machine(NAMED, gpus)
    assert hardware.processor(provider) == told
    assert hardware.processor("CPUExecutionProvider") == "Some CPU @ 3 GHz, 2 cores"


@pytest.mark.parametrize(
    ("sizes", "largest"),
    [
        (["32K", "512K", "16M"], 16 << 20),
        (["1G", "64M"], 1 << 30),
        (["48K"], 48 << 10),
        (["48K", "nonsense", "", "9", "2.5M"], 48 << 10),
        (["32K\n"], 32 << 10),
        (["nonsense"], hardware._USUAL_CACHE),
        ([], hardware._USUAL_CACHE),
    ],
)
def test_the_largest_cache(machine, tmp_path, sizes, largest):
    machine()
    for index, size in enumerate(sizes):
        (tmp_path / "cache" / f"index{index}").mkdir(parents=True)
        (tmp_path / "cache" / f"index{index}" / "size").write_text(size)
    assert hardware.cache_bytes() == largest


def test_a_cache_that_cannot_be_read_is_passed_over(machine, tmp_path):
    machine()
    (tmp_path / "cache" / "index0" / "size").mkdir(parents=True)
    (tmp_path / "cache" / "index1").mkdir()
    (tmp_path / "cache" / "index1" / "size").write_bytes(b"\xff4K")
    assert hardware.cache_bytes() == hardware._USUAL_CACHE
