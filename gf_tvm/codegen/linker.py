"""What links kernels; found without importing TVM, for those who only ask whether something can be built."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys

from ..errors import BuildError
from ..machine.profiles import DeviceProfile


def find_linker(profile: DeviceProfile) -> list[str]:
    """The command that links for ``profile``: a compiler, and what it has to be told about the target.

    For this machine's architecture the system's C++ compiler; for another one Debian's cross compiler; for both, where
    there is none, the one in PyPI's ziglang (the extra ``cross``).

    Raises:
        BuildError: nothing to link with; says what to install.
    """
    native = platform.machine() == profile.arch
    # A kernel needs little of libc and nothing of libstdc++, whose version on a board may be older than ours.
    names = ("g++", "c++", "clang++") if native else (f"{profile.triple}-gcc", f"{profile.triple}-g++")
    for name in names:
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{profile.triple}.{profile.glibc}"]
    if native:
        raise BuildError(
            "no C++ compiler found to link with; install g++ (Debian: apt-get install g++) "
            "or ziglang (pip install 'gf-tvm[cross]')"
        )
    package = f"g++-{profile.triple.replace('_', '-')}"
    raise BuildError(
        f"nothing found to link for {profile.arch} with on this {platform.machine()} machine; install "
        f"Debian's cross compiler (apt-get install {package}) or ziglang (pip install 'gf-tvm[cross]')"
    )
