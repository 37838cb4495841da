# SPDX-License-Identifier: MIT
"""The sandbox: plain programs, escapes that are contained and happen without it, and refusals.

Every escape prints DEED where it has done its deed. Where that is harmless a control runs the same
program without a sandbox and must see it: a program that fails for another reason proves nothing.
"""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from refusals import refused

from dsv2_ref.alignment import sandbox, sandbox_launcher
from dsv2_ref.alignment.sandbox import Outcome, Uncontained, run, run_many

DEED = "the deed is done"
SECRET = "what only the caller knows"
ROOT = Path(__file__).parent.parent
AS_ROOT = sys.platform == "linux" and os.geteuid() == 0
LITTLE = 20.0           # seconds that starting and ending may take on a crowded machine


def works(way: str) -> bool:
    try:
        return bool(sandbox._first_that_works((way,), os.geteuid()))
    except Uncontained:
        return False


if sys.platform != "linux":
    pytest.skip("the sandbox needs Linux", allow_module_level=True)
WAYS = [way for way in sandbox.WAYS if works(way)]
if not WAYS:
    pytest.skip("this system allows neither namespaces nor Landlock", allow_module_level=True)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(sandbox, "WAYS", (request.param,))
    return request.param


@pytest.fixture(scope="module", autouse=True)
def orphans_come_here():
    """Whoever loses its parent becomes a child of this process, so that none is overlooked."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(36, 1, 0, 0, 0) == 0                              # PR_SET_CHILD_SUBREAPER
    yield
    libc.prctl(36, 0, 0, 0, 0)


def descendants(of: int) -> dict[int, str]:
    """Processes below `of`, zombies too: pid -> command line."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2]
                                               .split()[1])
            except OSError:                         # it has just ended
                pass
    found, more = {}, {of}
    while more := {pid for pid, parent in parents.items() if parent in more}:
        for pid in more:
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            except OSError:
                pass
    return found


def wait_for(condition) -> bool:
    end = time.monotonic() + 20
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(true)


# --- plain programs


@pytest.mark.parametrize("code, stdin, expected", [
    ("print(6 * 7)", "", "42\n"),
    ("", "", ""),
    ("print(sum(map(int, input().split())))", "3 4 5\n", "12\n"),
    ("import sys\nsys.stdout.write(sys.stdin.read()[::-1])", "é中文🙂", "🙂文中é"),
    ("print('中文 ' + chr(0x1F642))", "", "中文 🙂\n"),
    ("exit()", "", ""),
    ("import sys\nprint(1)\nsys.exit(0)\nprint(2)", "", "1\n"),
    ("if __name__ == '__main__':\n    print(__name__)", "", "__main__\n"),
    ("import json, math, random, re, collections, dataclasses, asyncio, typing, itertools\n"
     "import datetime, decimal, fractions, functools, hashlib, heapq, statistics, unittest\n"
     "@dataclasses.dataclass\nclass A:\n    x: int\n"
     "print(json.dumps({'a': math.floor(2.5)}), A(3), hashlib.sha256(b'').hexdigest()[:4])", "",
     '{"a": 2} A(x=3) e3b0\n'),
    ("open('a.txt', 'w').write('kept')\nprint(open('a.txt').read())", "", "kept\n"),
    ("import tempfile\nwith tempfile.TemporaryFile() as f:\n    print(f.write(b'abc'))", "", "3\n"),
    ("import os\nopen(os.devnull, 'w').write('x')", "", ""),
    ("import sys\nprint('x', file=sys.stderr)", "", ""),
    ("print('x' * 65535)", "", "x" * 65535 + "\n"),                     # exactly the limit
    ("# " + "x" * 300_000 + "\nprint(1)", "", "1\n"),                   # no argument holds it
    ("import sys\nprint(len(sys.stdin.read()))", "x" * 300_000, "300000\n"),
    ("import sys\nsys.stdout.buffer.write(b'\\xff!')", "", "\ufffd!"),
    ("try:\n    b = bytearray(2**30)\nexcept MemoryError:\n    print('no')", "", "no\n"),
])
def test_a_plain_program(way, code, stdin, expected):
    assert run(code, stdin, seconds=60) == Outcome(True, expected, "")


@pytest.mark.parametrize("code, stdout, why", [
    ("print(1)\n1 / 0", "1\n", "exit code 1: ZeroDivisionError: division by zero"),
    ("exit(3)", "", "exit code 3"),
    ("raise SystemExit('wrong\\x1b[2J')", "", "exit code 1: wrong [2J"),
    ("import sys\nprint('a\\nb', file=sys.stderr)\nsys.exit(7)", "", "exit code 7: b"),
    ("x = = 1", "", "exit code 1: SyntaxError: invalid syntax"),
    ("raise ValueError('x' * 999)", "", ("exit code 1: ValueError: " + "x" * 999)[:213]),
    ("import numpy", "", "exit code 1: ModuleNotFoundError: No module named 'numpy'"),
    ("input()", "", "exit code 1: EOFError: EOF when reading a line"),
    ("import os\nos.kill(os.getpid(), 9)", "", "signal 9 (SIGKILL)"),
    ("import os\nos.abort()", "", "signal 6 (SIGABRT)"),
    ("import signal\nsignal.raise_signal(15)", "", "signal 15 (SIGTERM)"),
    ("a = bytearray(2**30)", "", "memory: MemoryError, at most 268435456 bytes"),
    ("print('\\0')\nprint(1 / 0)", "\0\n", "exit code 1: ZeroDivisionError: division by zero"),
])
def test_a_program_that_fails(way, code, stdout, why):
    assert run(code, seconds=60) == Outcome(False, stdout, why)


@pytest.mark.parametrize("code, word", [("print('\0')", "null byte"), ("'\ud800'", "surrogate")])
def test_a_code_that_no_file_can_hold(code, word):
    outcome = run(code)
    assert not outcome.ok and outcome.stdout == "" and "\n" not in outcome.why
    assert outcome.why.startswith("code: ") and word in outcome.why


def test_bad_arguments_are_refused():
    for seconds in (0, -1.0, float("nan"), float("inf"), 86401):
        refused(lambda s=seconds: run("", seconds=s), "seconds", seconds, "expected")
    for memory in (0, 2**25 - 1, 2**63):
        refused(lambda m=memory: run("", memory_bytes=m), "memory_bytes", memory, "expected")
    refused(lambda: run("", "\ud800"), "stdin", "surrogate")


def test_the_least_memory_is_enough_for_the_interpreter(way):
    code = "import json, re, collections, dataclasses\nprint(1)"
    assert run(code, memory_bytes=sandbox.LEAST_MEMORY, seconds=60) == Outcome(True, "1\n", "")


def test_the_same_program_walks_a_set_in_the_same_order(way):
    code = "print(list(set('abcdefgh')))"
    assert len({run(code, seconds=60) for _ in range(3)}) == 1


def test_many_at_once_come_back_in_order_and_leave_nothing(way, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    codes = [f"open('a', 'w').write('x')\nprint({i})\nexit({i % 3})" for i in range(12)]
    open_before = set(os.listdir("/proc/self/fd"))
    for i, outcome in enumerate(run_many(codes, workers=6, seconds=60)):
        assert outcome.stdout == f"{i}\n" and outcome.ok == (i % 3 == 0)
    assert set(os.listdir("/proc/self/fd")) == open_before
    assert not list(tmp_path.iterdir()) and not descendants(os.getpid())


@pytest.mark.skipif("namespaces" not in WAYS, reason="this system allows no namespaces")
def test_in_namespaces_all_but_the_scratch_folder_is_read_only(monkeypatch):
    monkeypatch.setattr(sandbox, "WAYS", ("namespaces",))
    code = ("import json, os\nprint([os.statvfs(path).f_flag & os.ST_RDONLY "
            "for path in ('/', '/dev', '/usr/lib', json.__file__, '.')])")
    assert run(code, seconds=60) == Outcome(True, "[1, 1, 1, 1, 0]\n", "")


def test_the_time_is_counted_from_the_start_of_the_program(way, monkeypatch, tmp_path):
    begin = "    try:\n        os.umask"
    slow = tmp_path / "launcher.py"
    text = sandbox.LAUNCHER.read_text()
    slow.write_text("import time\n" + text.replace(begin, "    time.sleep(1)\n" + begin))
    assert len(slow.read_text()) > len(text) + 20
    monkeypatch.setattr(sandbox, "LAUNCHER", slow)
    start = time.monotonic()
    outcome = run("import time\ntime.sleep(1000)", seconds=0.3)
    assert outcome.why == "time: more than 0.3 s" and time.monotonic() - start > 1.2


def test_a_launcher_that_ends_is_no_verdict_on_the_program(way, monkeypatch, tmp_path):
    run("")
    broken = tmp_path / "launcher.py"
    for text, word in [("raise KeyError('what is wrong')", "what is wrong"), ("", "ended early")]:
        broken.write_text(text)
        monkeypatch.setattr(sandbox, "LAUNCHER", broken)
        with pytest.raises(Uncontained, match=word):
            run("print(1)")


def test_the_interpreter_must_start(way, monkeypatch):
    """A library that is out of reach is no fault of the program."""
    known = sandbox._readable()
    monkeypatch.setattr(sandbox, "_readable", lambda: known[:1])
    sandbox._first_that_works.cache_clear()
    with pytest.raises(Uncontained, match="no program can be contained here"):
        run("print(1)")


def test_a_caller_that_is_killed_takes_its_program_along(way):
    code = ("from dsv2_ref.alignment import sandbox\n"
            f"sandbox.WAYS = {(way,)}\n"
            "sandbox.run('import time\\ntime.sleep(1000)', seconds=1000)")
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    launcher = str(sandbox.LAUNCHER)

    def started() -> bool:      # the launcher waits, and the process below it is the interpreter
        lines = descendants(caller.pid).values()
        return (any("1001" in line and launcher in line for line in lines)
                and any(line and launcher not in line for line in lines))

    assert wait_for(started)
    caller.kill()
    caller.wait()

    def gone() -> bool:
        with contextlib.suppress(ChildProcessError):   # orphans are this process's to reap
            os.waitpid(-1, os.WNOHANG)
        return not descendants(os.getpid())

    assert wait_for(gone)
    for folder in Path(tempfile.gettempdir()).glob("dsv2-sandbox-*"):
        if (folder / "scratch" / "program.py").read_bytes().endswith(b"time.sleep(1000)"):
            shutil.rmtree(folder)                      # nobody was left to delete it


# --- what a system may not allow


WITHOUT = """
import os, sys
from dsv2_ref.alignment import sandbox, sandbox_launcher
column, _ = sandbox_launcher.machine()
numbers = {{"namespaces": sandbox_launcher.REFUSED["unshare"][column],
           "landlock": sandbox_launcher.LANDLOCK_RULESET}}
sandbox_launcher.refuse_calls([numbers[way] for way in {ways}], [])
try:
    print(sandbox._first_that_works(sandbox.WAYS, os.geteuid())[0])
    print(sandbox.run("open('FILE', 'w')").why)
except sandbox.Uncontained as error:
    print(error)
"""


@pytest.mark.parametrize("without", [[], ["namespaces"], ["landlock"], ["namespaces", "landlock"]],
                         ids=lambda ways: " and ".join(ways) or "nothing")
def test_a_system_without(without, tmp_path):
    tmp_path.chmod(0o777)
    code = WITHOUT.format(ways=without).replace("FILE", str(tmp_path / "new"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.stderr == "" and not (tmp_path / "new").exists()
    lines = done.stdout.splitlines()
    if left := [way for way in WAYS if way not in without]:
        assert lines[0] == left[0] and "Error" in lines[1] and len(lines) == 2
    else:
        (line,) = lines
        assert line.startswith("sandbox: no program can be contained here (namespaces: ")
        assert "unshare: Operation not permitted; landlock: " in line


def test_another_system_is_refused_with_one_line(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    sandbox._first_that_works.cache_clear()
    with pytest.raises(Uncontained) as caught:
        run("print(1)")
    assert str(caught.value) == "sandbox: darwin is not supported, expected Linux"


def test_another_machine_is_refused():
    class Other:
        machine = "riscv64"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "uname", Other)
        with pytest.raises(OSError, match="machine: riscv64, expected x86_64 or aarch64"):
            sandbox_launcher.machine()


@pytest.mark.parametrize("column, header",
                         [(0, "asm/unistd_64.h"), (1, "asm-generic/unistd.h")])
def test_the_numbers_of_the_system_calls_are_the_kernels(column, header):
    found = [*Path("/usr/include").glob(header), *Path("/usr/include").glob(f"*/{header}")]
    if not found:
        pytest.skip("the kernel's headers are not installed")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\s", found[0].read_text()))
    tables = {**sandbox_launcher.REFUSED, **sandbox_launcher.ON_ITSELF,
              "pivot_root": sandbox_launcher.PIVOT_ROOT,
              "mount_setattr": sandbox_launcher.MOUNT_SETATTR}
    known = {name: row[column] for name, row in tables.items() if name in numbers}
    assert known == {name: int(numbers[name]) for name in known} and len(known) > 40
    for name in tables.keys() - known:                 # newer than the headers, or not there
        number = tables[name][column]
        assert number is None or number > max(map(int, numbers.values()))


# --- escapes


class Escape(NamedTuple):
    """A program; its words in capitals are put in by `Caller.words`."""

    name: str
    code: str
    control: bool = True          # it is harmless, and does its deed without a sandbox
    why: str = ""                 # how the reason must begin, where there is one only
    seconds: float = 60.0


NO = False
END = f"\nprint({DEED!r})"
SOCKET = "import socket\ns = socket.socket(socket.{}, socket.{})\n"
MOUNT = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert {} == 0"
ESCAPES = [
    # other processes
    Escape("fork", "import os\nif os.fork() == 0: os._exit(0)" + END),
    Escape("fork bomb", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", NO,
           "time: ", 0.5),
    Escape("spawn", "import subprocess, sys\nsubprocess.run([sys.executable, '-V'])" + END),
    Escape("another program", "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo DEED'])"),
    Escape("thread", "import threading\nthreading.Thread(target=int).start()" + END),
    Escape("daemon", """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open('FOLDER/daemon', 'w').close()
        for fd in range(3): os.close(fd)
        time.sleep(600)
    os._exit(0)
os.wait()
while not os.path.exists('FOLDER/daemon'): time.sleep(0.01)""" + END),
    Escape("kill another", "import os\nos.kill(VICTIM, 9)" + END),
    Escape("stop another", "import signal\nsignal.pidfd_send_signal(__import__('os').pidfd_open("
           "VICTIM), signal.SIGSTOP)" + END),
    Escape("kill the caller", "import os\nos.kill(CALLER, 9)" + END, NO),
    Escape("kill the parent", "import os\nos.kill(os.getppid(), 9)" + END, NO),
    Escape("kill all", "import os\nos.kill(-1, 9)" + END, NO),
    Escape("kill a group", "import os\nos.killpg(VICTIM, 15)" + END),
    Escape("slow the caller", "import os\nos.setpriority(os.PRIO_PROCESS, VICTIM, 19)" + END),
    Escape("limit the caller", "import resource\n"
           "resource.prlimit(VICTIM, resource.RLIMIT_CORE, (0, 0))" + END),
    Escape("trace another", "import ctypes\n"
           "assert ctypes.CDLL(None).ptrace(0x4206, VICTIM, 0, 0) == 0" + END),
    Escape("memory of another", "open('/proc/VICTIM/mem', 'rb').close()" + END),
    Escape("memory of process 1", "open('/proc/1/mem', 'rb').close()" + END, NO),
    # files
    Escape("write in the caller's folder", "open('FOLDER/new', 'w').write('x')" + END),
    Escape("write in /tmp", "open('/tmp/dsv2-escape-CALLER', 'w').close()" + END),
    Escape("write in the home", "open('HOME/new', 'w').write('x')" + END),
    Escape("delete", "import os\nos.remove('FOLDER/old')" + END),
    Escape("empty", "import os\nos.truncate('FOLDER/old', 0)" + END),
    Escape("rename", "import os\nos.rename('FOLDER/old', 'FOLDER/new')" + END),
    Escape("change the mode", "import os\nos.chmod('FOLDER/old', 0o777)" + END),
    Escape("change the time", "import os\nos.utime('FOLDER/old', (0, 0))" + END),
    Escape("make a folder", "import os\nos.mkdir('FOLDER/new')" + END),
    Escape("change the interpreter", "import json\nopen(json.__file__, 'r+').close()" + END,
           os.access(os.__file__, os.W_OK)),
    Escape("read a file", "print(open('FOLDER/secret').read())"),
    Escape("read the home", "import os\nprint(os.listdir('HOME'))" + END),
    Escape("read users", "open('/etc/passwd').read()" + END),
    Escape("read passwords", "open('/etc/shadow').read()" + END, AS_ROOT),
    Escape("read the package", "open('PACKAGE').read()" + END),
    Escape("link out", "import os\nos.symlink('FOLDER/secret', 'link')\n"
           "print(open('link').read())"),
    Escape("link out to write", "import os\nos.symlink('FOLDER', 'link')\n"
           "open('link/new', 'w').write('x')" + END),
    Escape("hard link", "import os\nos.link('FOLDER/secret', 'link')\nprint(open('link').read())"),
    Escape("a parent's folder", "import os\nfor _ in range(9): os.chdir('..')\n"
           "open(os.getcwd() + 'FOLDER/new', 'w').write('x')" + END),
    Escape("environment", "import os\nprint(os.environ['DSV2_SECRET'])"),
    Escape("environment of the parent", "import os\n"
           "open(f'/proc/{os.getppid()}/environ', 'rb').read()" + END),
    Escape("environment of another", "print(open('/proc/VICTIM/environ', 'rb').read())"),
    # the network
    Escape("TCP", SOCKET.format("AF_INET", "SOCK_STREAM") +
           "s.connect(('127.0.0.1', TCP))" + END),
    Escape("UDP", SOCKET.format("AF_INET", "SOCK_DGRAM") +
           "s.sendto(b'x', ('127.0.0.1', UDP))" + END),
    Escape("name", "import socket\nsocket.gethostbyname('localhost')" + END),
    Escape("unix socket", SOCKET.format("AF_UNIX", "SOCK_STREAM") +
           "s.connect('FOLDER/socket')" + END),
    Escape("abstract socket", SOCKET.format("AF_UNIX", "SOCK_STREAM") +
           "s.connect('\\0dsv2-CALLER')" + END),
    Escape("shared memory", "import ctypes\nlibc = ctypes.CDLL(None)\n"
           "n = libc.shmget(0, 4096, 0o1600)\nassert n >= 0 and libc.shmctl(n, 0, 0) == 0" + END),
    Escape("queue", "import ctypes\nlibc = ctypes.CDLL(None)\n"
           "n = libc.msgget(0, 0o1600)\nassert n >= 0 and libc.msgctl(n, 0, 0) == 0" + END),
    # limits
    Escape("endless loop", "while True: pass", NO, "time: ", 0.5),
    Escape("sleep", "import time\ntime.sleep(1000)", NO, "time: ", 0.5),
    Escape("endless loop that ignores signals", "import signal\nfor s in signal.valid_signals():\n"
           "    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
           "while True: pass", NO, "time: ", 0.5),
    Escape("closed output", "import os, time\nfor fd in range(64):\n    try: os.close(fd)\n"
           "    except OSError: pass\ntime.sleep(1000)", NO, "time: ", 0.5),
    Escape("reading for ever", "import sys\nwhile True: sys.stdin.read()", NO, "time: ", 0.5),
    Escape("memory", "x = b'x' * 2**29" + END, True, "memory: "),
    Escape("memory bit by bit", "x = []\nwhile True: x.append(bytes(2**20))", NO, "memory: "),
    Escape("hidden memory", "import os\nn = os.memfd_create('x')" + END),
    Escape("output", "import os\nwhile True: os.write(1, b'x' * 4096)", NO, "output: stdout"),
    Escape("errors", "import os\nwhile True: os.write(2, b'x' * 4096)", NO, "output: stderr"),
    Escape("a huge file", "with open('a', 'wb') as f: f.write(bytes(2**24 + 1))" + END),
    Escape("many big files", "for i in range(40): open(f'{i}', 'wb').write(bytes(2**20))\n"
           "import time\ntime.sleep(1)" + END),
    Escape("many files", "for i in range(2000): open(f'{i}', 'w').close()\n"
           "import time\ntime.sleep(1)" + END),
    Escape("many descriptors", "import os\nx = [os.dup(0) for _ in range(100)]" + END),
    Escape("a core", "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (1, 1))" + END,
           AS_ROOT),
    # rights
    Escape("root again", "import os\nos.setuid(0)\nopen('/etc/shadow').read()" + END, AS_ROOT),
    Escape("root in a space of its own", MOUNT.format("libc.unshare(0x10000000)") + END,
           works("namespaces")),
    Escape("mount", MOUNT.format("libc.unshare(0x20000)") + "\n" + MOUNT.format(
           "libc.mount(b'x', b'FOLDER', b'tmpfs', 0, None)") + END,
           AS_ROOT and "namespaces" in WAYS),
    Escape("writable again", MOUNT.format("libc.mount(b'x', b'/', None, 0x1020, None)") + END, NO),
    Escape("another root", "import os\nos.chroot('.')" + END, AS_ROOT),
    Escape("device", "import os, stat\n"
           "os.mknod('zero', stat.S_IFCHR | 0o600, os.makedev(1, 5))\nopen('zero').close()" + END,
           AS_ROOT),
    Escape("rights", "import ctypes\nheader, data = (ctypes.c_uint32 * 2)(0x20080522, 0), "
           "(ctypes.c_uint32 * 6)()\nctypes.CDLL(None).capget(header, data)\n"
           "assert any(data)" + END, AS_ROOT),
    # a result that is not its own
    Escape("forged", "import os\nfor fd in range(64):\n    try: os.write(fd, b'ended 0\\n')\n"
           "    except OSError: pass\nos._exit(3)", NO, "exit code 3"),
]
each = pytest.mark.parametrize("escape", ESCAPES, ids=[e.name for e in ESCAPES])


class Caller:
    """What an escape could reach: files that anybody may write, sockets, a variable, a process."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dsv2-caller-"))
        for name in ("scratch", "home"):
            (self.folder / name).mkdir()
        for path in (self.folder / "secret", self.folder / "old", self.folder / "home" / "secret"):
            path.write_text(SECRET)
        for path in (self.folder, *self.folder.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        self.sockets = [socket.socket(), socket.socket(type=socket.SOCK_DGRAM),
                        socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
        names = [("127.0.0.1", 0), ("127.0.0.1", 0), str(self.folder / "socket"),
                 f"\0dsv2-{os.getpid()}"]
        for server, name in zip(self.sockets, names, strict=True):
            server.bind(name)
            server.setblocking(False)
            if server.type != socket.SOCK_DGRAM:
                server.listen()
        (self.folder / "socket").chmod(0o777)
        self.victim = subprocess.Popen(["sleep", "600"], env={"DSV2_SECRET": SECRET},
                                       start_new_session=True)
        assert wait_for(lambda: Path(f"/proc/{self.victim.pid}/stat").read_text().split()[2] == "S")
        self.before = self.state()

    def words(self, code: str) -> str:
        words = {"FOLDER": self.folder, "HOME": self.folder / "home", "CALLER": os.getpid(),
                 "VICTIM": self.victim.pid, "TCP": self.sockets[0].getsockname()[1],
                 "UDP": self.sockets[1].getsockname()[1], "PACKAGE": sandbox.__file__,
                 "DEED": DEED}
        for word, value in words.items():
            code = code.replace(word, str(value))
        return code

    def state(self) -> object:
        """Everything that an escape could change."""
        files = {}
        for path in (self.folder, *sorted(self.folder.rglob("*"))):
            about = path.lstat()
            files[path] = (about.st_mode, about.st_nlink, about.st_mtime_ns, about.st_size,
                           about.st_uid, path.read_bytes() if path.is_file() else None)
        heard = []
        for server in self.sockets:
            try:
                server.recv(9) if server.type == socket.SOCK_DGRAM else server.accept()[0].close()
                heard.append(True)
            except BlockingIOError:
                heard.append(False)
        process = Path(f"/proc/{self.victim.pid}")
        about = (process / "stat").read_text().rpartition(")")[2].split()
        return (files, heard, about[0], about[16], (process / "limits").read_text(),
                os.path.exists(f"/tmp/dsv2-escape-{os.getpid()}"), sorted(descendants(os.getpid())))

    def close(self) -> None:
        for server in self.sockets:
            server.close()
        for pid in {*descendants(os.getpid()), self.victim.pid}:        # a control's daemon too
            os.kill(pid, signal.SIGKILL)
        self.victim.wait()
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        Path(f"/tmp/dsv2-escape-{os.getpid()}").unlink(missing_ok=True)
        shutil.rmtree(self.folder)


@pytest.fixture
def caller(monkeypatch):
    monkeypatch.setenv("DSV2_SECRET", SECRET)
    caller = Caller()
    yield caller
    caller.close()


@each
def test_an_escape_is_contained(way, caller, escape):
    start = time.monotonic()
    outcome = run(caller.words(escape.code), "a\n" * 9, escape.seconds)
    assert time.monotonic() - start < (1 if escape.why.startswith("time") else 0) + LITTLE
    assert DEED not in outcome.stdout and SECRET not in outcome.stdout
    assert not outcome.ok and outcome.why.startswith(escape.why)
    assert outcome.why and "\n" not in outcome.why and len(outcome.stdout) <= sandbox.OUTPUT_BYTES
    assert caller.state() == caller.before             # nothing changed, nobody heard, none is left


@pytest.mark.parametrize("escape", [e for e in ESCAPES if e.control],
                         ids=[e.name for e in ESCAPES if e.control])
def test_the_same_program_does_its_deed_without_a_sandbox(caller, escape):
    environment = {"DSV2_SECRET": SECRET}
    done = subprocess.run([sys.executable, "-I", "-S", "-c", caller.words(escape.code)],
                          cwd=caller.folder / "scratch", env=environment, input=b"a\n" * 9,
                          capture_output=True, timeout=60)
    assert DEED in done.stdout.decode() or SECRET in done.stdout.decode(), done.stderr.decode()
