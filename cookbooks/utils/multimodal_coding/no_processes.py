"""Run inside the lock by locked_down.sh: gives up starting processes, then runs the program it is named.

A limit on processes does not hold for root, so a fork bomb would take the whole machine along. The kernel's
filter for system calls (seccomp) holds for everyone; threads stay possible.
"""

import ctypes
import os
import runpy
import sys

# Audit architecture, then the numbers of clone, clone3, and of what is refused: fork and vfork where there
# are such; unshare and setns, which would make a program root again in a namespace of its own.
CALLS = {
    "x86_64": (0xC000003E, 56, 435, (57, 58, 272, 308)),
    "aarch64": (0xC00000B7, 220, 435, (97, 268)),
}
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, DENY, ABSENT, KILL = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38, 0x80000000  # 1: EPERM, 38: ENOSYS
CLONE_THREAD, OLD_ABI = 0x00010000, 0x40000000
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2


class Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("true", ctypes.c_ubyte),
        ("false", ctypes.c_ubyte),
        ("k", ctypes.c_uint32),
    )


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction)))


def give_up_processes() -> None:
    """From here on only threads can be started; OSError on a kernel or machine of another kind."""
    machine = os.uname().machine
    if machine not in CALLS:
        raise OSError(f"machine={machine!r}: programs are locked down on {' and '.join(CALLS)} only")
    architecture, clone, clone3, refused = CALLS[machine]
    steps = [
        (LOAD, 0, 0, 4),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),
        (JUMP_EQUAL, 0, 1, clone3),  # its flags are out of a filter's sight; without it clone is taken
        (RETURN, 0, 0, ABSENT),
    ]
    for test, number in [(JUMP_AT_LEAST, OLD_ABI), *((JUMP_EQUAL, call) for call in refused)]:
        steps += [(test, 0, 1, number), (RETURN, 0, 0, DENY)]
    steps += [
        (JUMP_EQUAL, 1, 0, clone),
        (RETURN, 0, 0, ALLOW),
        (LOAD, 0, 0, 16),
        (JUMP_BITS, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, DENY),
    ]
    program = Program(len(steps), (Instruction * len(steps))(*(Instruction(*step) for step in steps)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "the kernel refused a filter for system calls")


if __name__ == "__main__":
    give_up_processes()
    runpy.run_path(sys.argv[1], run_name="__main__")
