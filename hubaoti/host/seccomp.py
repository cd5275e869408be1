"""Which system calls a process may still make: seccomp(2), told by a small program for the kernel.

The program is made of four instructions of the classic BPF (linux/filter.h), which look at a call's
number and arguments (`struct seccomp_data` of linux/seccomp.h). A call that is refused fails as one
that the user may not make; nobody is ended for it.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Iterable, Iterator, Sequence

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS: four bytes at an offset of the call's data
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K: skip so many instructions if it is k, else so many
_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_HAS_BITS = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_ALLOW = 0x7FFF0000  # SECCOMP_RET_ALLOW
_ERROR = 0x00050000  # SECCOMP_RET_ERRNO, with the error's number in its low half
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16  # offsets in the data; an argument has eight bytes
# AUDIT_ARCH_* of linux/audit.h, and the call seccomp itself.
_MACHINES = {"x86_64": (0xC000003E, 317), "aarch64": (0xC00000B7, 277)}
_X32 = 0x40000000  # from here on an x86_64 kernel has the same calls again, by other numbers
_SET_FILTER, _ALL_THREADS = 1, 1  # SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC
_GET_ACTION = 2  # SECCOMP_GET_ACTION_AVAIL
_AF_UNIX = 1
_CLONE_THREAD = 0x00010000

# What has the kernel send signals to a process of one's choice (fcntl.h, asm/ioctls.h): F_SETOWN,
# F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP. And what types into a terminal: TIOCSTI, TIOCLINUX.
_OWNERS, _TERMINALS = (8, 10, 15), (0x8901, 0x8902, 0x5412, 0x541C)

# Numbers on x86_64 and aarch64 (asm/unistd.h); 0 where there is no such call.
_OTHERS = {  # what looks into other processes, or sends them signals past kill(2)
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"kcmp": (312, 272), "process_madvise": (440, 440), "process_mrelease": (448, 448)},
    **{"pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424)},
    **{"tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
    **{"setpriority": (141, 140), "ioprio_set": (251, 30), "migrate_pages": (256, 238)},
}
_SYSTEM = {  # what is a system's to set, and ways around this very filter, as io_uring is
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51)},
    **{"move_mount": (429, 429), "open_tree": (428, 428), "open_tree_attr": (467, 467)},
    **{"mount_setattr": (442, 442)},
    **{"fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433)},
    **{"setns": (308, 268), "unshare": (272, 97), "open_by_handle_at": (304, 265)},
    **{"init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106)},
    **{"kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142)},
    **{"swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60)},
    **{"settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266)},
    **{"adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162)},
    **{"iopl": (172, 0), "ioperm": (173, 0), "syslog": (103, 116), "fanotify_init": (300, 262)},
}
_ATTRIBUTES = {  # modes, owners, labels and times of files, of which landlock says nothing
    **{"chmod": (90, 0), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, 0), "lchown": (94, 0), "fchown": (93, 55), "fchownat": (260, 54)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16)},
    **{"setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469)},
    **{"utimensat": (280, 88), "utime": (132, 0), "utimes": (235, 0), "futimesat": (261, 0)},
}
_SHARED = {  # memory and queues without a file, which any process of the user may find
    **{"shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195)},
    **{"msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180)},
}
_LEAVING = {"setsid": (112, 157), "setpgid": (109, 154)}  # the group that is ended as one
_SOCKETS = {  # what is done with one; a pair that was made before can still be used
    **{"connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202)},
    **{"accept4": (288, 242), "sendmsg": (46, 211), "sendmmsg": (307, 269)},
}
_STARTS = {"fork": (57, 0), "vfork": (58, 0), "execve": (59, 221), "execveat": (322, 281)}
_PLACED = {  # on which cores, and before whom, a thread runs, by its id; 0 is who asks
    **{"sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119)},
    **{"sched_setparam": (142, 118), "sched_setattr": (314, 274)},
}
_FCNTL, _IOCTL, _MOVE_PAGES = (72, 25), (16, 29), (279, 239)
_SOCKET, _SENDTO, _KILL, _TGKILL = (41, 198), (44, 206), (62, 129), (234, 131)
_PRLIMIT = (302, 261)
_CLONE, _CLONE3 = (56, 220), (435, 435)

_Instruction = tuple[int, int, int, int]  # code, how many to skip if so, if not, k


def probe_seccomp() -> bool:
    """Whether this kernel takes such programs, on a machine whose numbers are known."""
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        return False
    action = ctypes.c_uint32(_ERROR)
    return _call(_GET_ACTION, 0, ctypes.byref(action)) == 0


def refuse_foreign_calls(*, network: bool) -> bool:
    """Have all threads look into no other process and set nothing of the system; whether they do.

    What they ask of the cores and the turn of another thread is said to be done, and is not: a
    runtime may ask it for its own threads, and nothing here tells whose an id is. Without `network`
    they open no sockets but local ones. Files and processes of their own are as before. The process
    has to be one that gains no privileges (`PR_SET_NO_NEW_PRIVS`).
    """
    return _load(_list_foreign(network=network))


def refuse_calls(process: int, *, local_sockets: bool, processes: bool, signals: bool) -> bool:
    """Have all threads of this process do what a graph needs, and little else; whether they do.

    Besides `refuse_foreign_calls`, without a network: they change no file's mode, owner or times
    and leave no group of processes. Without `local_sockets` there are none at all; without
    `processes` none is started; without `signals` they go to this one alone, whose id is `process`.
    """
    return _load(_list_all(process, local_sockets, processes, signals))


def _list_foreign(*, network: bool) -> Iterator[_Instruction]:
    yield from _refuse((_OTHERS | _SYSTEM).values())
    yield from _require_argument(_PRLIMIT, 0, 0)  # of this process
    yield from _require_argument(_MOVE_PAGES, 0, 0)
    for call in _PLACED.values():
        yield from _require_argument(call, 0, 0, error=0)
    yield from _refuse_argument(_FCNTL, 1, _OWNERS)
    yield from _refuse_argument(_IOCTL, 1, _TERMINALS)
    if not network:
        yield from _require_argument(_SOCKET, 0, _AF_UNIX)


def _list_all(
    process: int, local_sockets: bool, processes: bool, signals: bool
) -> Iterator[_Instruction]:
    yield from _list_foreign(network=False)
    yield from _refuse((_ATTRIBUTES | _SHARED | _LEAVING).values())
    if not local_sockets:
        yield from _refuse([_SOCKET, *_SOCKETS.values()])
        yield from _require_argument(
            _SENDTO, 4, 0, whole=True
        )  # the address, of which a pair has no need
    if not signals:
        yield from _require_argument(_KILL, 0, process)
        yield from _require_argument(_TGKILL, 0, process)
    if not processes:
        yield from _refuse(_STARTS.values())
        yield from _refuse([_CLONE3], errno.ENOSYS)  # its flags are in memory: clone is asked then
        yield from _require_thread()


def _refuse(calls: Iterable[tuple[int, int]], error: int = errno.EPERM) -> Iterator[_Instruction]:
    """Have calls fail; whatever is skipped is the one instruction that says so."""
    for number in filter(None, map(_choose, calls)):
        yield from ((_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERROR | error))


def _require_argument(
    call: tuple[int, int],
    index: int,
    value: int,
    *,
    whole: bool = False,
    error: int = errno.EPERM,
) -> Iterator[_Instruction]:
    """Have a call fail unless an argument has a value, which is one of C's int.

    Its high half may then be anything; of an address it is looked at, too (`whole`), and is zero.
    Where `error` is 0 the call is not made, and who makes it is told that it was.
    """
    halves = ((0, value), (4, 0)) if whole else ((0, value),)
    yield (_EQUAL, 0, 3 * len(halves) + 1, _choose(call))
    for offset, half in halves:
        yield (_LOAD, 0, 0, _ARGUMENTS + 8 * index + offset)
        yield (_EQUAL, 1, 0, half)
        yield (_RETURN, 0, 0, _ERROR | error)
    yield (_LOAD, 0, 0, _NUMBER)


def _refuse_argument(
    call: tuple[int, int], index: int, values: Sequence[int]
) -> Iterator[_Instruction]:
    """Have a call fail where an argument has one of some values, which are of C's int."""
    yield (_EQUAL, 0, 2 * len(values) + 2, _choose(call))
    yield (_LOAD, 0, 0, _ARGUMENTS + 8 * index)
    for value in values:
        yield from ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ERROR | errno.EPERM))
    yield (_LOAD, 0, 0, _NUMBER)


def _require_thread() -> Iterator[_Instruction]:
    """Have clone fail where it does not make a thread of this process."""
    yield (_EQUAL, 0, 4, _choose(_CLONE))
    yield (_LOAD, 0, 0, _ARGUMENTS)
    yield (_HAS_BITS, 1, 0, _CLONE_THREAD)
    yield (_RETURN, 0, 0, _ERROR | errno.EPERM)
    yield (_LOAD, 0, 0, _NUMBER)


def _choose(call: tuple[int, int]) -> int:
    """A call's number on this machine."""
    return call[platform.machine() == "aarch64"]


def _load(instructions: Iterable[_Instruction]) -> bool:
    """Give the kernel a program, for all threads; whether it took it."""
    if not probe_seccomp():
        return False
    machine, _ = _MACHINES[platform.machine()]
    refused = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    program = [
        (_LOAD, 0, 0, _MACHINE),
        *((_EQUAL, 1, 0, machine), refused),
        (_LOAD, 0, 0, _NUMBER),
        *((_AT_LEAST, 0, 1, _X32), refused),
        *instructions,
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("=HBBI", *each) for each in program)
    kept = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(kept)))
    return _call(_SET_FILTER, _ALL_THREADS, header) == 0


def _call(operation: int, flags: int, argument: object) -> int:
    """seccomp(2)'s answer; -1 where it is refused, or this system has no such thing."""
    _, number = _MACHINES[platform.machine()]
    try:
        return int(ctypes.CDLL(None).syscall(number, operation, flags, argument))
    except (AttributeError, OSError):
        return -1
