"""Device profiles: every board by its own name, with what tuning, compiling and reports need to know of it."""

from __future__ import annotations

import functools
import json
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import DeviceError


@dataclass(frozen=True)
class GpuProfile:
    """What schedules, checks and reports need to know of a GPU.

    Attributes:
        arch: in NVIDIA's words, "sm_53".
        threads: most threads of a block that schedules may use.
        registers: 32-bit registers of a block.
        shared_bytes: shared memory of a block.
        multiprocessors: that run blocks side by side; None where the profile stands for many boards.
        peak_fp16_gflops: as ``peak_gflops`` of the profile, in float16.
    """

    arch: str
    threads: int = 256
    registers: int = 65536
    shared_bytes: int = 48 * 1024
    multiprocessors: int | None = None
    peak_fp16_gflops: float | None = None

    @property
    def target(self) -> str:
        """TVM target as JSON text. It knows no registers: they are checked in the compiled code, by codegen.cuda."""
        return json.dumps(
            {
                "kind": "cuda",
                "arch": self.arch,
                "max_threads_per_block": self.threads,
                "max_num_threads": self.threads,
                "max_shared_memory_per_block": self.shared_bytes,
                "thread_warp_size": 32,
            }
        )


@dataclass(frozen=True)
class DeviceProfile:
    """One kind of device.

    Attributes:
        name: explicit; also the folder of its tuning logs.
        description: for people.
        arch: machine name as ``platform.machine()`` gives it; "" where any machine can hold the device.
        target: TVM target as JSON text; "" takes that of the GPU.
        gpu: what runs the kernels if it is not the CPU; the fields about vector registers and caches are 0 then.
        lanes: float32 values in a vector register.
        registers: vector registers.
        l1_bytes: data cache of one core.
        l2_bytes: second-level cache, which ``l2_cores`` cores share.
        cpu_flags: instruction set extensions that the code uses, in the words of /proc/cpuinfo.
        peak_gflops, bandwidth_gbs: float32 peak and memory bandwidth if the profile is one board; None where it
            stands for many machines and the benchmark measures them.
        threads: with which kernels run and are measured if the profile is one board; None: as many as PyTorch uses.
        measured: where trials usually run: "here" (the machine that tunes) or "rpc" (boards behind a tracker).
        glibc: oldest version of the C library that a cross-linked bundle runs with.
    """

    name: str
    description: str
    arch: str
    target: str = ""
    lanes: int = 0
    registers: int = 0
    l1_bytes: int = 0
    l2_bytes: int = 0
    cpu_flags: tuple[str, ...] = ()
    peak_gflops: float | None = None
    bandwidth_gbs: float | None = None
    l2_cores: int = 1
    threads: int | None = None
    measured: str = "here"
    glibc: str = "2.27"
    gpu: GpuProfile | None = None

    def __post_init__(self) -> None:
        if not self.target:
            if self.gpu is None:
                raise ValueError(f"the profile {self.name!r} of a CPU needs a target")
            object.__setattr__(self, "target", self.gpu.target)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Storage dtypes that its kernels exist for: Maxwell, and CUDA before 11, know no bfloat16."""
        return ("float32", "float16") if self.gpu else ("float32", "float16", "bfloat16")

    @property
    def l2_share(self) -> int:
        """Bytes of the second-level cache for one core while all of them work."""
        return self.l2_bytes // self.l2_cores

    @property
    def triple(self) -> str:
        """Architecture, system and ABI in the words of linkers ("aarch64-linux-gnu")."""
        return str(json.loads(self.target)["mtriple"])


_V3_FLAGS = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4_FLAGS = (*_V3_FLAGS, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

#: All that have a name: CPUs, the most capable first, then single boards. A new board is one entry here.
_PROFILES = (
    # The x86-64 micro-architecture levels of the System V ABI: a log or bundle made for one runs on every CPU of it.
    DeviceProfile(
        name="x86-64-v4",
        description="x86-64 with AVX-512",
        arch="x86_64",
        target='{"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4"}',
        lanes=16,
        registers=32,
        l1_bytes=32 * 1024,
        l2_bytes=1024 * 1024,
        cpu_flags=_V4_FLAGS,
    ),
    DeviceProfile(
        name="x86-64-v3",
        description="x86-64 with AVX2 and FMA",
        arch="x86_64",
        target='{"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"}',
        lanes=8,
        registers=16,
        l1_bytes=32 * 1024,
        l2_bytes=256 * 1024,
        cpu_flags=_V3_FLAGS,
    ),
    DeviceProfile(
        name="aarch64",
        description="64-bit Arm with NEON",
        arch="aarch64",
        target='{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}',
        lanes=4,
        registers=32,
        l1_bytes=32 * 1024,
        l2_bytes=256 * 1024,
        cpu_flags=("asimd",),
    ),
    # Behind "aarch64", which is what "host" means on any 64-bit Arm machine: /proc/cpuinfo's flags do not tell a
    # Cortex-A72 from other cores, so rpi4 is always the user's explicit choice, on a Pi 4 itself as well.
    DeviceProfile(
        name="rpi4",
        description="Raspberry Pi 4: 4 x Cortex-A72, 1.5 GHz, 64-bit system",
        arch="aarch64",
        # TVM's tag raspberry-pi/4b-aarch64, written out: a log's target must not change with TVM's list of tags.
        target='{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72", "mattr": ["+neon"], '
        '"num-cores": 4}',
        lanes=4,
        registers=32,
        # Arm's Cortex-A72 manual and Broadcom's BCM2711: 32 KiB of L1 data cache a core, 1 MiB of L2 for all four.
        l1_bytes=32 * 1024,
        l2_bytes=1024 * 1024,
        l2_cores=4,
        cpu_flags=("asimd",),
        # Derived, not measured: one FMA of four float32 a cycle and core (Arm's software optimisation guide), so
        # 4 cores x 1.5 GHz x 8. Later boards run at 1.8 GHz (57.6).
        peak_gflops=48.0,
        # STREAM, as published for this board; not measured by us.
        bandwidth_gbs=5.6,
        threads=4,
        measured="rpc",
    ),
    DeviceProfile(
        name="jetson-nano",
        description="Jetson Nano: Maxwell GPU (sm_53) with 128 cores, 4 x Cortex-A57",
        arch="aarch64",
        # Derived, not measured: 128 cores x 921.6 MHz x one FMA a cycle; LPDDR4 at 1600 MHz, 64 bits wide. NVIDIA's
        # data sheet of the module gives the same figures.
        peak_gflops=236.0,
        bandwidth_gbs=25.6,
        measured="rpc",
        gpu=GpuProfile(arch="sm_53", registers=32768, multiprocessors=1, peak_fp16_gflops=472.0),
    ),
)

#: Architectures that GPU profiles can be made for: every one since Maxwell has what the schedules use.
_GPU_NAME = re.compile(r"sm_([5-9][0-9]|1[0-9][0-9])")


def _gpu_profile(arch: str) -> DeviceProfile:
    """Any GPU of an architecture. Limits are those that all of them have; peaks are measured where it matters."""
    return DeviceProfile(name=arch, description=f"NVIDIA GPU, {arch}", arch="", gpu=GpuProfile(arch))


def list_profiles() -> tuple[DeviceProfile, ...]:
    """All named profiles: those of CPUs, the most capable first, then single boards; ``sm_NN`` is a name as well."""
    return _PROFILES


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction set extensions of this CPU (Linux); empty where they cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def missing_flags(profile: DeviceProfile) -> list[str]:
    """What this CPU lacks to run code made for ``profile``."""
    return [flag for flag in profile.cpu_flags if flag not in cpu_flags()]


def present_gpu() -> str:
    """The architecture ("sm_90") of this machine's first NVIDIA GPU. Raises DeviceError if there is none."""
    from gf_cuda import GfCudaError, get_driver

    try:
        return get_driver().device().arch
    except GfCudaError as error:
        raise DeviceError(f"no NVIDIA GPU can be used on this machine: {error}") from None


def runs_here(profile: DeviceProfile) -> bool:
    """Whether this machine can run code made for ``profile``."""
    if profile.arch not in ("", platform.machine()):
        return False
    if profile.gpu is None:
        return not missing_flags(profile)
    try:
        return present_gpu() == profile.gpu.arch
    except DeviceError:
        return False


def get_profile(name: str) -> DeviceProfile:
    """The profile called ``name``.

    ``host`` is the most capable profile of a CPU that this machine runs, ``cuda`` that of its GPU; ``sm_NN`` is any
    GPU of that architecture.

    Raises:
        DeviceError: no such profile, or none fits this machine.
    """
    if name == "host":
        cpus = [profile for profile in _PROFILES if profile.gpu is None]
        for profile in cpus:
            if runs_here(profile):
                return profile
        raise DeviceError(
            f"no device profile fits this machine ({platform.machine()}); known: "
            + ", ".join(profile.name for profile in cpus)
        )
    if name == "cuda":
        name = present_gpu()
    if _GPU_NAME.fullmatch(name):
        return _gpu_profile(name)
    for profile in list_profiles():
        if profile.name == name:
            return profile
    known = ", ".join(["host", "cuda", *(profile.name for profile in list_profiles()), "sm_NN"])
    raise DeviceError(f"unknown device {name!r}; known: {known}")
