"""Compiles the kernels while the package is built or installed; see `[tool.setuptools]` in pyproject.toml.

A plain C interface, loaded with ctypes, not a Python extension module: one library serves every Python
version, and a C or C++ program can link it. Without a working compiler the install goes on, and NumPy does
the work.
"""

import os
import platform
import sys

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "piflow_kernels"

GNU_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",  # Python's own flags often ask for debug information, which is most of the file
    "-pthread",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",  # only what says fma is one: the same rounding wherever a formula is inlined
    "-Wno-psabi",  # vectors are passed between inlined functions only
]
MSVC_FLAGS = ["/std:c++17", "/O2", "/EHsc", "/fp:precise"]


def library_name() -> str:
    """File name of the shared library on this system, within the package."""
    return {"win32": f"{NAME}.dll", "darwin": f"lib{NAME}.dylib"}.get(sys.platform, f"lib{NAME}.so")


def isa_flags() -> dict[str, list[str]]:
    """What isa.cpp is compiled for, beside the baseline, where the compiler can."""
    # macOS may compile for both architectures at once; the baseline serves there, as it does on aarch64.
    if sys.platform == "darwin" or platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    return {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx2", "-mfma"]}


class BuildKernels(build_ext):
    """`build_ext`, but isa.cpp is compiled once per instruction set and the result is a plain library."""

    def run(self):
        self._or_numpy(super().run)

    def build_extension(self, ext):
        self._or_numpy(self._build_library, ext)

    def _or_numpy(self, build, *arguments):
        try:
            build(*arguments)
        except Exception as error:  # compilers are missing or fail in many ways; none may stop the install
            self.warn(f"the kernels could not be compiled, NumPy will do their work: {error}")

    def _build_library(self, ext):
        msvc = self.compiler.compiler_type == "msvc"
        flags = MSVC_FLAGS if msvc else GNU_FLAGS
        main, isa = ext.sources

        def compile_source(source, name, defines, flags):
            folder = os.path.join(self.build_temp, name)  # apart: isa.cpp gives several objects of one name
            return self.compiler.compile(
                [source], output_dir=folder, macros=defines, extra_postargs=flags, depends=ext.depends
            )

        objects = compile_source(isa, "baseline", [("PIFLOW_ISA", "baseline")], flags)
        found = []
        for name, more in ({} if msvc else isa_flags()).items():
            try:
                objects += compile_source(isa, name, [("PIFLOW_ISA", name)], flags + more)
                found.append((f"PIFLOW_HAVE_{name}", "1"))
            except Exception as error:
                self.warn(f"the compiler cannot build kernels for {name}, which are left out: {error}")
        objects += compile_source(main, "main", found, flags)
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[] if msvc else ["-pthread"],
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")[:-1], library_name())


class PlainWheel(bdist_wheel):
    """A wheel for this platform, but for any Python 3: the library does not touch Python's interface."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]
