"""What providers compute in, on machines that are only pretended."""

import os
import subprocess
from math import inf

import pytest

from onnx_lowrank import cgroups, hardware

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
    monkeypatch.setattr(cgroups, "_MEMBERSHIP", tmp_path / "none")
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
            return subprocess.CompletedProcess(command, 0, gpus.encode("latin-1"), b"")

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
        ("A, 1\r\nB\xae, 1\r\n", "A, 1; B\ufffd, 1 Some CPU @ 3 GHz, 2 cores"),
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


# --- what the process may use -----------------------------------------------------------------------

V2 = "0::/pod/own\n"
OWN_V1, ROOT_V1 = "memory/docker/own/memory", "memory/memory"
CACHED = "anon 5\ninactive_file 250\ntotal_inactive_file 400\n"
V1 = "7:memory:/docker/own\n4:cpu,cpuacct:/docker/own\n1:name=systemd:/docker/own\n0::/\n"


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """Control groups: their files, and the line that tells the own group."""
    monkeypatch.setattr(cgroups, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cgroups, "_MOUNTS", tmp_path / "mounts")

    def groups(membership, **files):
        (tmp_path / "membership").write_text(membership)
        for path, text in files.items():
            file = tmp_path / "mounts" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return groups


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        (V2, {}, inf),
        (V2, {"pod/own/cpu.max": "max 100000\n"}, inf),
        (V2, {"pod/own/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"pod/own/cpu.max": "max 100000\n", "pod/cpu.max": "50000 100000\n"}, 0.5),
        (V2, {"pod/own/cpu.max": "400000 100000", "pod/cpu.max": "200000 100000", "cpu.max": "9 1"}, 2),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/../other\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/pod/own\n", {"unified/pod/own/cpu.max": "200000 100000\n"}, 2),
        (V2, {"pod/own/cpu.max": "nonsense"}, inf),
        (V2, {"pod/own/cpu.max": "100000 0"}, inf),
        (
            V1,
            {"cpu/docker/own/cpu.cfs_quota_us": "-1\n", "cpu/docker/own/cpu.cfs_period_us": "100000\n"},
            inf,
        ),
        (
            V1,
            {"cpu/docker/own/cpu.cfs_quota_us": "250000", "cpu/docker/own/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        # Inside a container the host's path is not mounted.
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n"}, inf),
        ("", {"cpu.max": "100000 100000"}, inf),
    ],
)
def test_the_quota_of_cpu_time(groups, membership, files, cpus):
    groups(membership, **files)
    assert cgroups.cpus() == cpus


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (9.0, 4), (4.0, 4), (3.2, 4), (2.0, 2), (0.3, 1)])
def test_cores_are_those_of_the_affinity_within_the_quota(monkeypatch, groups, quota, cores):
    groups(V2, **({} if quota is None else {"pod/cpu.max": f"{quota * 100000:.0f} 100000"}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    assert hardware.cores() == cores


def test_without_affinity_all_cores_count(monkeypatch, groups):
    groups("")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert hardware.cores() == 6
    groups(V2, **{"pod/cpu.max": "100000 100000"})
    assert hardware.cores() == 1


@pytest.mark.parametrize(
    ("membership", "files", "free"),
    [
        (V2, {"pod/own/memory.max": "max\n", "pod/own/memory.current": "7\n"}, 3 << 20),
        (V2, {"pod/own/memory.max": "2000\n", "pod/own/memory.current": "500\n"}, 1500),
        (V2, {"pod/memory.max": "2000", "pod/memory.current": "1900", "pod/memory.stat": CACHED}, 350),
        (V2, {"pod/memory.max": "2000", "pod/memory.current": "2100"}, 0),
        (V2, {"pod/own/memory.max": "2000\n"}, 3 << 20),
        (V1, {f"{OWN_V1}.limit_in_bytes": "2000", f"{OWN_V1}.usage_in_bytes": "500"}, 1500),
        (V1, {f"{ROOT_V1}.limit_in_bytes": "2000", f"{ROOT_V1}.usage_in_bytes": "1500",
              f"{ROOT_V1}.stat": CACHED}, 900),
        (V1, {f"{ROOT_V1}.limit_in_bytes": str(2**63 - 4096), f"{ROOT_V1}.usage_in_bytes": "5"}, 3 << 20),
    ],
)  # fmt: skip
def test_free_memory_is_that_of_the_machine_within_the_limits(
    monkeypatch, tmp_path, groups, membership, files, free
):
    groups(membership, **files)
    monkeypatch.setattr(hardware, "_MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   3072 kB\n")
    assert hardware.free_memory() == free


def test_free_memory_where_the_system_does_not_tell(monkeypatch, tmp_path, groups):
    groups("")
    monkeypatch.setattr(hardware, "_MEMINFO", tmp_path / "none")
    sizes = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", lambda name: sizes[name], raising=False)
    assert hardware.free_memory() == 4096000
    monkeypatch.delattr(os, "sysconf")
    assert hardware.free_memory() == hardware._USUAL_MEMORY
