# SPDX-License-Identifier: MIT
"""One Python program in a process of its own, and what became of it.

Compiler feedback (section 4.2) and Pass@1 run programs that a model wrote. Most are harmless, some
never end, and a few delete or fill what they reach. So a program gets an interpreter, a scratch
folder that is deleted afterwards, its input, and nothing else: no other file, no network, no
variable of the caller, no new process or thread. Time, memory, files and output are limited.

    run("print(6 * 7)").stdout                         "42\\n"
    run("1 / 0").why                                   "exit code 1: ZeroDivisionError: ..."
    run("while True: pass", seconds=0.5).why           "time: more than 0.5 s"

This contains the mistakes of one's own models. It is not a boundary against attackers: they would
look for a fault of the kernel, and then nothing here holds.

What a judge must know: 1. `ok` says that the program ended by itself with exit code 0, not that it
did its task: it may end with `exit(0)` before its own checks. Let it print, and compare `stdout`.
2. Only the standard library can be imported, no installed package. 3. Sets of texts are walked in
the same order every time (PYTHONHASHSEED is 0); `random` and the time still differ. 4. `seconds`
are counted from where the interpreter starts, so they include its 10 ms.

Linux only, 5.12 or later, on x86-64 or 64-bit ARM: see sandbox_launcher.py for the two ways, of
which the first that works here is taken. Elsewhere, or where neither works, `Uncontained` is
raised; a program never runs without containment. Landlock differs for the program in three points:
names of files outside can be seen, its folder takes no folders, and a user `root` who alone can
read the interpreter stays that user, without its rights.
One call takes 35 ms (Landlock) to 50 ms (namespaces) on a free core, most of it two starts of
Python; the first call of a process runs one program more, to see what works. Threads may call.
"""

import functools
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
WAYS = ("namespaces", "landlock")     # in the order in which they are tried
OUTPUT_BYTES = 2**16                  # of stdout, and of stderr
FILE_BYTES = 2**24                    # of all files together
FILES = 1024
LEAST_MEMORY = 2**25                  # what the interpreter itself needs, and some room
START_SECONDS = 60.0                  # the launcher's; a crowded machine is slow
DAY = 86400
NOBODY = 65534                        # the user without rights of its own, by custom


class Outcome(NamedTuple):
    """What became of a program. why: "" where ok, else one line."""

    ok: bool              # it ended by itself, with exit code 0, within all limits
    stdout: str           # at most OUTPUT_BYTES; what is not UTF-8 becomes U+FFFD
    why: str


class Uncontained(RuntimeError):
    """This system lets no program be contained, so none was run."""


def run(code: str, stdin: str = "", seconds: float = 2.0, memory_bytes: int = 2**28) -> Outcome:
    """Run a Python program. `seconds` of wall time; `memory_bytes` of address space.

    ValueError for bad arguments, Uncontained where the system allows no containment. A code that
    no file of Python can hold is an Outcome like any other.
    """
    if not 0 < seconds <= DAY:
        raise ValueError(f"seconds: {seconds}, expected more than 0 and at most {DAY}")
    if not LEAST_MEMORY <= memory_bytes < 2**63:
        raise ValueError(f"memory_bytes: {memory_bytes}, expected {LEAST_MEMORY} to 2**63 - 1")
    try:
        given = stdin.encode()
    except UnicodeEncodeError:
        raise ValueError("stdin: a lone surrogate, expected text that UTF-8 can hold") from None
    try:
        program = code.encode()
    except UnicodeEncodeError:
        return Outcome(False, "", "code: a lone surrogate, expected text that UTF-8 can hold")
    if b"\0" in program:
        return Outcome(False, "", "code: a null byte, expected the text of a program")
    way, uid = _first_that_works(WAYS, os.geteuid() if hasattr(os, "geteuid") else -1)
    return _attempt(way, uid, program, given, seconds, memory_bytes)


def run_many(codes: Sequence[str], workers: int, **limits: float) -> list[Outcome]:
    """`run` for each program, `workers` at once; `limits` are run's other arguments."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda code: run(code, **limits), codes))


@functools.lru_cache
def _first_that_works(ways: tuple[str, ...], user: int) -> tuple[str, int]:
    """(way, uid that programs get): the first that runs a program here; Uncontained if none."""
    if sys.platform != "linux":
        raise Uncontained(f"sandbox: {sys.platform} is not supported, expected Linux")
    whys = []
    for way in ways:
        # root's own programs are nobody's; with Landlock, an interpreter in root's home needs root
        uids = (NOBODY, 0) if user == 0 and way == "landlock" else (NOBODY,)
        for uid in uids:
            try:
                outcome = _attempt(way, uid, b"print(6 * 7)", b"", START_SECONDS, 2**28)
                if outcome == (True, "42\n", ""):
                    return way, uid
                why = outcome.why or f"printed {outcome.stdout!r}"
            except Uncontained as error:
                why = str(error).removeprefix("sandbox: ")
        whys.append(f"{way}: {why}")
    raise Uncontained(f"sandbox: no program can be contained here ({'; '.join(whys)})")


@functools.lru_cache
def _readable() -> tuple[str, ...]:
    """The interpreter, its library, and the system's libraries: no path inside another one."""
    interpreter = os.path.realpath(sys.executable)
    prefix = os.path.realpath(sys.base_prefix)
    paths = [interpreter, *(f"{prefix}/{name}" for name in ("lib", "lib64")), "/usr/lib",
             "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
    there = [path for path in dict.fromkeys(paths) if os.path.exists(path)]
    return tuple(path for path in there
                 if not any(path.startswith(f"{other}/") for other in there))


def _attempt(way: str, uid: int, program: bytes, stdin: bytes, seconds: float,
             memory_bytes: int) -> Outcome:
    """Run it in this way; Uncontained where the launcher says no."""
    folder = Path(tempfile.mkdtemp(prefix="dsv2-sandbox-"))
    try:
        scratch = folder / "scratch"                  # namespaces mount another one over it
        scratch.mkdir(mode=0o700)
        (scratch / "program.py").write_bytes(program)
        (folder / "stdin").write_bytes(stdin)
        if os.geteuid() == 0:
            for path in (folder, scratch, scratch / "program.py"):
                os.chown(path, uid, uid)
        command = [os.path.realpath(sys.executable), "-I", "-S", "-B", str(LAUNCHER)]
        settings = [way, *map(str, (uid, memory_bytes, math.ceil(seconds) + 1))]
        status, status_end = os.pipe()
        try:
            with open(folder / "stdin", "rb") as given:
                process = subprocess.Popen(
                    [*command, str(status_end), *settings, str(scratch), *_readable()],
                    stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", env={},
                    pass_fds=[status_end], start_new_session=True)
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(status_end)
        with _Watched(process, status, scratch) as watched:
            limit = watched.follow(seconds)
        return watched.outcome(limit, memory_bytes)
    finally:
        shutil.rmtree(folder)


class _Watched:
    """A launcher and what it says: read as it comes, and ended with all its processes."""

    def __init__(self, process: subprocess.Popen, status: int, scratch: Path) -> None:
        self.process, self.status, self.scratch = process, status, scratch
        self.pipes = {"status": status, "stdout": process.stdout.fileno(),
                      "stderr": process.stderr.fileno()}
        self.read = {name: bytearray() for name in self.pipes}

    def __enter__(self) -> "_Watched":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left: the launcher ends after all others."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
        os.close(self.status)

    def follow(self, seconds: float) -> str:
        """Read until all pipes are closed; the limit that was passed before, or ""."""
        end, started = time.monotonic() + START_SECONDS, False
        with selectors.DefaultSelector() as selector:
            for name, pipe in self.pipes.items():
                selector.register(pipe, selectors.EVENT_READ, name)
            while selector.get_map():
                if (left := end - time.monotonic()) <= 0:
                    return f"time: more than {seconds:g} s" if started else "not started"
                for key, _ in selector.select(min(left, 0.05)):
                    data = os.read(key.fd, 2**16)
                    if not data:
                        selector.unregister(key.fd)
                    self.read[key.data] += data
                    if key.data != "status" and len(self.read[key.data]) > OUTPUT_BYTES:
                        return f"output: {key.data} has more than {OUTPUT_BYTES} bytes"
                if not started and self.read["status"].startswith(b"started\n"):
                    started, end = True, time.monotonic() + seconds
                if why := self._files():
                    return why
        return ""

    def _files(self) -> str:
        """Whether the scratch folder on disk holds too much; the one in memory has its own size."""
        sizes = []
        with os.scandir(self.scratch) as entries:
            for entry in entries:
                try:
                    sizes.append(entry.stat(follow_symlinks=False).st_blocks * 512)
                except FileNotFoundError:                               # deleted meanwhile
                    pass
        if sum(sizes) > FILE_BYTES or len(sizes) > FILES:
            return f"files: more than {FILE_BYTES} bytes or {FILES} files"
        return ""

    def outcome(self, limit: str, memory_bytes: int) -> Outcome:
        """From what was read; Uncontained where no program was started."""
        said = self.read["status"].decode().splitlines()
        stdout = self.read["stdout"][:OUTPUT_BYTES].decode(errors="replace")
        lines = self.read["stderr"].decode(errors="replace").strip().splitlines()
        last = "".join(c if c.isprintable() else " " for c in lines[-1])[:200] if lines else ""
        refusals = [line for line in said if line.startswith("refused ")]
        if refusals or "started" not in said:
            why = refusals[0].removeprefix("refused ") if refusals else last or limit
            raise Uncontained(f"sandbox: {why or 'the launcher ended early'}")
        if limit or not said[-1].startswith("ended "):
            return Outcome(False, stdout, limit or "killed: its launcher was")
        code = int(said[-1].removeprefix("ended "))
        if code == 0:
            return Outcome(True, stdout, "")
        if last.startswith("MemoryError"):
            return Outcome(False, stdout, f"memory: {last}, at most {memory_bytes} bytes")
        what = f"exit code {code}" if code > 0 else f"signal {-code} ({signal.Signals(-code).name})"
        return Outcome(False, stdout, f"{what}: {last}" if last else what)
