# SPDX-License-Identifier: Apache-2.0
"""The emulator's operators beside FFN (csrc/emulator/aten/operators.txt): built once for each torch, then
loaded.

They run as ATen on CPU, which ties them to the C++ ABI of one torch, so they are compiled where torch is
installed, on first use, and kept in the user's cache directory under torch's version and a hash of
everything they are made of.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("csrc")
ATEN = SOURCES / "emulator" / "aten"
# C++20 for torch's headers. -O0: the operators' work is in libtorch, and this builds in a third of -O2's
# time.
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-w"]
# torch_npu asks libopapi.so first and libraries of older CANNs last, all by name: the first of those is free.
SONAME = "libaclnn_ops_infer.so"
GENERATED = 2  # files that the table becomes: with aten.cc and moe.cc, four equal parts for the compiler
KEPT = 4  # libraries in the cache: environments and checkouts that are used in turn


class BuildError(Exception):
    """One sentence: why there are no operators."""


def load() -> None:
    """Makes the operators known to torch_npu, which must not be loaded yet. Where they cannot be built,
    says so on stderr and leaves the FFN operators alone to work."""
    try:
        library = build()
    except BuildError as error:
        print(f"ffn_ops.emulator: {error}; only the FFN operators work", file=sys.stderr)
        return
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def build() -> Path:
    """The library for this torch, from the cache, or built now."""
    sources = sorted({*ATEN.glob("*.*"), *SOURCES.rglob("*.h")})
    if not (ATEN / "operators.txt").exists():
        raise BuildError(f"the operators' sources are not in {SOURCES} (run `make build`)")
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sources:
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ffn_ops")
    library = cache / f"operators-{torch.__version__}-{digest.hexdigest()[:16]}.so"
    try:
        if not intact(library):
            install(library)
    except OSError as error:
        raise BuildError(
            f"the other operators could not be kept in {cache}: {error} (set XDG_CACHE_HOME to a folder "
            "that can be written)"
        ) from None
    return library


def install(library: Path) -> None:
    """Builds the library into the cache, and removes what killed builds and all but the last few left."""
    compiler, cache = find_compiler(), library.parent
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes, one builds and the others wait
        if intact(library):
            return
        print(
            f"ffn_ops.emulator: compiling the operators for torch {torch.__version__}, once: a minute or two",
            file=sys.stderr,
            flush=True,
        )
        for killed in cache.glob("tmp*"):
            shutil.rmtree(killed)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            compile_all(compiler, Path(folder), Path(folder, SONAME))
            seal(Path(folder, SONAME))
            os.replace(Path(folder, SONAME), library)
        built = sorted(cache.glob("operators-*.so"), key=lambda path: path.stat().st_mtime)
        for older in built[:-KEPT]:
            older.unlink()


def seal(library: Path) -> None:
    """Ends the file with its hash, which the loader does not mind."""
    digest = hashlib.sha256(library.read_bytes()).digest()
    with open(library, "ab") as file:
        file.write(digest)


def intact(library: Path) -> bool:
    """Whether it is there as seal left it: to load one that was cut short is a SIGBUS."""
    if not library.exists():
        return False
    content = library.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise BuildError("no C++ compiler was found (install g++ or clang++, or name one in CXX)")


def compile_all(compiler: str, folder: Path, library: Path) -> None:
    generated = [folder / f"operators{i}.cc" for i in range(GENERATED)]
    run([sys.executable, str(ATEN / "generate.py"), str(ATEN / "operators.txt"), *map(str, generated)])
    package = Path(torch.__file__).parent
    flags = [*FLAGS, f"-I{SOURCES}", f"-isystem{package / 'include'}"]
    files = [*generated, ATEN / "moe.cc", ATEN / "aten.cc"]
    objects = [folder / f"{path.stem}.o" for path in files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [
            [compiler, *flags, "-c", str(file), "-o", str(target)]
            for file, target in zip(files, objects, strict=True)
        ]
        list(pool.map(run, commands))
    # The emulator's own libraries, and torch's, are in the process by then: no path is recorded.
    link = [compiler, "-shared", *map(str, objects), "-o", str(library), f"-Wl,-soname,{SONAME}"]
    run([*link, f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10"])


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if "error" in line.lower()] or [
            result.stderr.strip()
        ]
        raise BuildError(f"the other operators could not be built ({command[0]}: {lines[0]})")
