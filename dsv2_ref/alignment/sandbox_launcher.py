# SPDX-License-Identifier: MIT
"""How a process shuts itself in and then becomes the program. `sandbox.run` starts it, alone.

It is a script and imports nothing of this package: a small new process may change its own
namespaces, limits and user safely, and a copy of a process with threads may not. Its processes:

    launcher            waits; ends the others when `run` says so (SIGTERM) or is gone
      first of its own  only with namespaces: their process 1. When it ends, so does the rest
        program         limits, files, user, system calls; then the interpreter takes its place

Two ways to keep files away, and the order of `sandbox.WAYS` says which is tried first.

    namespaces  the process has a root folder of its own: the interpreter, read-only, and a scratch
                folder in memory. No other process, no network and no shared memory is in sight
    landlock    the kernel refuses to open any other file. Names of files can be seen (`stat`)

Both then refuse system calls (seccomp) that no exercise in Python needs: new processes and threads,
sockets, signals to others, shared memory, owners and modes of files. So a program is one thread:
when it ends, all of it has ended. Without namespaces that refusal is what keeps the network away.

What it writes to the pipe `status`: "started", then "ended CODE" (negative for a signal), or
"refused WHY" where the system does not allow something. The program does not have that pipe.
"""

import ctypes
import errno
import os
import resource
import signal
import sys

FILE_BYTES = 2**24        # of each file, and of the scratch folder in memory
FILES = 1024              # in that folder
OPEN_FILES = 64
PROGRAM = "program.py"
NOBODY = 65534            # the user without rights of its own, by custom

# `exit` and `quit` come from `site`, whose other work would cost more time than all the rest
BOOT = (f"import site; site.setquit(); del site; "
        f"exec(compile(open({PROGRAM!r}, 'rb').read(), {PROGRAM!r}, 'exec'))")

# Numbers of system calls by machine, None where it has no such call
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}     # column, name in a filter
REFUSED = {
    "socket": (41, 198), "fork": (57, None), "vfork": (58, None), "clone": (56, 220),
    "clone3": (435, 435), "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "process_madvise": (440, 440),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "io_uring_setup": (425, 425),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "open_by_handle_at": (304, 265), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
}
ON_ITSELF = {             # allowed where the first argument is 0 or the process itself
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "prlimit64": (302, 261),
}
PIVOT_ROOT, MOUNT_SETATTR = (155, 41), (442, 442)
LANDLOCK_RULESET, LANDLOCK_RULE, LANDLOCK_RESTRICT = 444, 445, 446

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> int:
    """A function of the C library, or a system call by number; OSError with its name."""
    whole = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = getattr(libc, name)(*whole)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{args[:1] if name == 'syscall' else ''}: "
                              f"{os.strerror(number)}")
    return result


def machine() -> tuple[int, int]:
    """Column of the tables, and the machine's number in a filter."""
    name = os.uname().machine
    if name not in MACHINES or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"machine: {name}, expected {' or '.join(MACHINES)}, 64 bits")
    return MACHINES[name]


def prctl(option: int, value: object = 0, more: object = 0) -> None:
    call("prctl", option, value, more, 0, 0)


def die_with_parent() -> None:
    prctl(1, signal.SIGKILL)                                            # PR_SET_PDEATHSIG


def watch(child: int) -> int:
    """Wait for a child, which SIGTERM ends at once; its exit code, negative for a signal."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- namespaces


def unshare() -> None:
    """New mounts, processes, network, IPC and host name: as root, or inside a user namespace."""
    uid, gid = os.geteuid(), os.getegid()
    spaces = 0x20000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
    if uid == 0:
        try:
            call("unshare", spaces)
            return
        except OSError:                             # a root without the right to: like a user
            pass
    call("unshare", spaces | 0x10000000)                                # CLONE_NEWUSER
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"),
                       ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    try:
        call("mount", source.encode(), target.encode(), kind and kind.encode(),
             flags, options.encode())
    except OSError as error:
        raise OSError(error.errno, f"mount {source}: {os.strerror(error.errno)}") from None


def new_root(folder: str, readable: list[str]) -> None:
    """A root folder in memory, mounted at `folder`: `readable`, /dev/null and an empty /scratch."""
    bind, everywhere, private, nosuid_nodev = 0x1000, 0x4000, 0x40000, 0x2 | 0x4
    with open(f"{folder}/{PROGRAM}", "rb") as file:
        program = file.read()
    mount("none", "/", None, everywhere | private)
    mount("tmpfs", folder, "tmpfs", nosuid_nodev, "mode=755,size=1m")
    for path in readable:
        target = folder + path
        os.makedirs(target if os.path.isdir(path) and not os.path.islink(path)
                    else os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):                                        # /lib -> usr/lib
            os.symlink(os.readlink(path), target)
            continue
        if not os.path.isdir(path):
            open(target, "w").close()
        mount(path, target, None, bind | everywhere)
    os.makedirs(f"{folder}/scratch")
    os.makedirs(f"{folder}/dev")
    open(f"{folder}/dev/null", "w").close()
    column, _ = machine()
    # read-only, no set-user-id, no devices, for every mount below; then the two that differ
    attributes = (ctypes.c_uint64 * 4)(0x1 | 0x2 | 0x4, 0, 0, 0)
    call("syscall", MOUNT_SETATTR[column], -100, folder.encode(), 0x8000, attributes, 32)
    mount("/dev/null", f"{folder}/dev/null", None, bind)
    mount("tmpfs", f"{folder}/scratch", "tmpfs", nosuid_nodev,
          f"mode=700,uid={NOBODY},gid={NOBODY},size={FILE_BYTES},nr_inodes={FILES}")
    with open(f"{folder}/scratch/{PROGRAM}", "wb") as file:
        file.write(program)
    os.chdir(folder)
    call("syscall", PIVOT_ROOT[column], b".", b".")
    call("umount2", b".", 2)                                            # the old root, MNT_DETACH
    os.chdir("/scratch")


# --- Landlock


def landlock(folder: str, readable: list[str]) -> None:
    """Open nothing but `readable` (to read) and files directly in `folder` (to write)."""
    version = call("syscall", LANDLOCK_RULESET, None, 0, 1)
    if version < 3:               # before, a file that may be read could be emptied
        raise OSError(errno.ENOSYS, f"version {version}, expected at least 3 (Linux 6.2)")
    execute, write, read, list_, remove, make, truncate = 1, 2, 4, 8, 32, 256, 1 << 14
    rights = ctypes.c_uint64(2**16 - 1 if version >= 5 else 2**15 - 1)
    rules = call("syscall", LANDLOCK_RULESET, ctypes.byref(rights), 8, 0)
    for path in [*readable, "/dev/null", folder]:
        allowed = execute | read | (list_ if os.path.isdir(path) else 0)
        if path == "/dev/null":
            allowed = read | write | truncate
        if path == folder:
            allowed = read | write | list_ | remove | make | truncate
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = allowed.to_bytes(8, sys.byteorder) + parent.to_bytes(4, sys.byteorder)
        call("syscall", LANDLOCK_RULE, rules, 1, rule, 0)
    os.chdir(folder)
    call("syscall", LANDLOCK_RESTRICT, rules, 0)


# --- what both do


def drop_rights(uid: int) -> None:
    """A user without rights: no groups, no capability, and no way to win one by `exec`."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())


def refuse_calls(refused: list[int], on_itself: list[int]) -> None:
    """A filter (seccomp) under which these system calls fail with EPERM, for good."""
    _, arch = machine()
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, fail, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    n, m = len(refused), len(on_itself)
    # instruction i jumps to i + 1 + (true or false); `no` and `check` are places below
    no, check = 6 + n + m, 7 + n + m
    lines = [(load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, kill), (load, 0, 0, 0),
             (at_least, no - 5, 0, 0x40000000)]                         # x86's other numbering
    lines += [(equal, no - i - 1, 0, number) for i, number in enumerate(refused, 5)]
    lines += [(equal, check - i - 1, 0, number) for i, number in enumerate(on_itself, 5 + n)]
    lines += [(answer, 0, 0, allow), (answer, 0, 0, fail), (load, 0, 0, 16), (equal, 1, 0, 0),
              (equal, 0, 1, os.getpid()), (answer, 0, 0, allow), (answer, 0, 0, fail)]
    code = b"".join(op.to_bytes(2, sys.byteorder) + bytes((true, false))
                    + value.to_bytes(4, sys.byteorder) for op, true, false, value in lines)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_void_p)]

    prctl(38, 1)                                                        # PR_SET_NO_NEW_PRIVS
    prctl(22, 2, ctypes.byref(Filter(len(lines), ctypes.addressof(buffer))))    # PR_SET_SECCOMP


def limit(memory_bytes: int, cpu_seconds: int) -> None:
    for name, value in (("AS", memory_bytes), ("CPU", cpu_seconds), ("FSIZE", FILE_BYTES),
                        ("NOFILE", OPEN_FILES), ("CORE", 0), ("MEMLOCK", 0)):
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def become_program(way: str, uid: int, folder: str, readable: list[str], status: int,
                   memory_bytes: int, cpu_seconds: int) -> None:
    os.setsid()
    os.umask(0o077)
    prctl(38, 1)                                                        # PR_SET_NO_NEW_PRIVS
    if way == "landlock":
        landlock(folder, readable)
    drop_rights(uid)
    die_with_parent()                                 # a change of user has undone it
    column, _ = machine()
    refuse_calls(*([numbers[column] for numbers in table.values() if numbers[column] is not None]
                   for table in (REFUSED, ON_ITSELF)))
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)         # nothing is inherited, not even "ignored"
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.write(status, b"started\n")                    # fails where `run` is gone
    limit(memory_bytes, cpu_seconds)
    os.execve(sys.executable, [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", BOOT],
              {"PYTHONHASHSEED": "0"})                # sets in the same order every time


def main(status: int, way: str, uid: int, memory_bytes: int, cpu_seconds: int, folder: str,
         *readable: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.set_inheritable(status, False)
    try:
        os.umask(0o022)
        die_with_parent()
        if way == "namespaces":
            unshare()
            if first := os.fork():
                watch(first)
                return
            die_with_parent()
            new_root(folder, list(readable))
        if child := os.fork():
            os.write(status, f"ended {watch(child)}\n".encode())
            return
        become_program(way, uid, folder, list(readable), status, memory_bytes, cpu_seconds)
    except OSError as error:
        os.write(status, f"refused {error.strerror or error}\n".encode())
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]), *sys.argv[6:])
