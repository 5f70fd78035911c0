"""Run Python with sockets forbidden: `python without_network.py ARGUMENTS OF PYTHON`.

On Linux the kernel ends a process that asks for any socket but a local one, whoever asks, native libraries included
(SIGSYS). Elsewhere an audit hook ends a process whose Python code asks; its native libraries are not watched.
"""

import ctypes
import os
import platform
import runpy
import sys

# Of linux/audit.h and the system calls' tables: how the kernel names the machine, and number of `socket`.
_MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
_AF_UNIX = 1
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # of linux/filter.h: BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_ALLOW, _END_PROCESS = 0x7FFF0000, 0x80000000  # of linux/seccomp.h
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2  # of linux/prctl.h


def is_watched_by_kernel() -> bool:
    return sys.platform == "linux" and platform.machine() in _MACHINES


def forbid_sockets() -> None:
    """Let the kernel end this process, or one that it starts, when it asks for a socket."""
    machine, socket_call = _MACHINES[platform.machine()]
    rules = [  # (operation, jump if true, jump if false, value)
        (_LOAD, 0, 0, 4),  # the machine
        (_IF_EQUAL, 0, 4, machine),
        (_LOAD, 0, 0, 0),  # the system call
        (_IF_EQUAL, 0, 2, socket_call),
        (_LOAD, 0, 0, 16),  # its first argument, the family
        (_IF_EQUAL, 0, 1, _AF_UNIX),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _END_PROCESS),
    ]

    class Rule(ctypes.Structure):
        _fields_ = (
            ("code", ctypes.c_ushort),
            ("true", ctypes.c_ubyte),
            ("false", ctypes.c_ubyte),
            ("value", ctypes.c_uint),
        )

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("rules", ctypes.POINTER(Rule)))

    program = Program(len(rules), (Rule * len(rules))(*rules))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        (_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)),
        (_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(program)),
    ):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def _end_on_socket(event: str, arguments: tuple) -> None:
    if event == "socket.__new__" and arguments[1] != _AF_UNIX:
        os._exit(99)


if __name__ == "__main__":
    if is_watched_by_kernel():
        forbid_sockets()
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    sys.addaudithook(_end_on_socket)
    kind, what, *sys.argv[1:] = sys.argv[1:]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
