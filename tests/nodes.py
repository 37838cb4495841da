# SPDX-License-Identifier: MIT
"""The page on several nodes does what it says, between two network namespaces (`make nodes`).

Each namespace has its own addresses and its own loopback, so that nothing gets from one to the
other but through the link between them. The commands are those of the page, word by word.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "dsv2_ref" / "parallel" / "several_nodes.md"
COMMANDS = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
NAMES = [f"dsv2-{os.getpid()}-{i}" for i in range(2)]
LONG = " --steps 4000 --save-every 5 --quiet"      # the last of an option given twice counts


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def add_nodes():
    """Two namespaces, 10.9.0.1 and 10.9.0.2, with a link between them."""
    for name in NAMES:
        ip("netns", "add", name)
    ip("link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns",
       NAMES[1])
    for i, name in enumerate(NAMES):
        ip("-n", name, "addr", "add", f"10.9.0.{i + 1}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")


def pids(name):
    done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True,
                          check=False)
    return [int(line) for line in done.stdout.split()]


def kill(name):
    """Everything in a namespace, with no time to say goodbye."""
    for _ in range(20):
        if not (there := pids(name)):
            return
        for pid in there:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.1)


def remove(name):
    kill(name)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def nodes():
    if os.name == "nt" or os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and `ip netns`")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)      # so that all is undone
    for name in ip("netns", "list").split():
        if (left := re.fullmatch(r"dsv2-(\d+)-\d", name)) and not Path("/proc", left[1]).exists():
            remove(name)
    try:
        try:
            add_nodes()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs network namespaces: {error.stderr.strip()}")
        yield NAMES
    finally:
        for name in NAMES:
            remove(name)
        signal.signal(signal.SIGTERM, before)


def start(folder, command, name=None):
    """A command of the page, in a folder that both nodes see, in a namespace or outside."""
    inside = ["ip", "netns", "exec", name] if name else []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*inside, "bash", "-ec", command], text=True, env=env, cwd=folder,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def both(nodes, tmp_path):
    """Starts the page's commands, with more words at their end, on both; what is left is killed."""
    started = []

    def begin(more="", change=lambda command: command):
        for name, command in zip(nodes, COMMANDS, strict=False):
            started.append(start(tmp_path, change(command).rstrip() + more, name))
        return started

    yield begin
    for name in nodes:
        kill(name)
    for process in started:
        process.communicate()


def ranks_in(name):
    """Rank -> process, of the workers that run in a namespace now."""
    found = {}
    for pid in pids(name):
        try:
            told = Path(f"/proc/{pid}/environ").read_text().split("\0")
        except OSError:
            continue
        found |= {int(line[5:]): pid for line in told if line.startswith("RANK=")}
    return found


def log_of(folder):
    file = folder / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(folder, step, processes):
    end = time.monotonic() + 300
    while len(log_of(folder)) < step:
        if any(process.poll() is not None for process in processes):
            pytest.fail("\n".join(process.communicate()[1][-2000:] for process in processes))
        assert time.monotonic() < end, f"step {step} was not reached"
        time.sleep(0.1)


def test_two_nodes_log_what_one_process_does(both, nodes, tmp_path):
    processes = both()
    seen = [set(), set()]
    while any(process.poll() is None for process in processes):
        seen = [ranks | set(ranks_in(name)) for ranks, name in zip(seen, nodes, strict=True)]
        time.sleep(1)
    told = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert seen == [{0, 1}, {2, 3}]
    out = tmp_path / "build" / "nodes"
    assert json.loads(told[0][0])["steps"] == len(log_of(out)) and told[1][0] == ""
    assert told[0][1].count("on this rank") == 1 and "on this rank" not in told[1][1]
    last = out / f"state-{len(log_of(out)):09}"
    assert {p.name[:3] for p in last.glob("__*")} == {"__0", "__1", "__2", "__3"}
    alone = start(tmp_path, COMMANDS[2])
    _, err = alone.communicate()
    assert alone.returncode == 0, err[-2000:]
    for mine, theirs in zip(log_of(out), log_of(tmp_path / "build" / "one"), strict=True):
        assert mine["step"] == theirs["step"] and mine["tokens"] == theirs["tokens"]
        assert mine["language"] == pytest.approx(theirs["language"], rel=2e-4)
        for key in ("expert", "device", "communication"):
            assert mine[key] == pytest.approx(theirs[key], abs=2e-4)        # nats, beside 6
        assert mine.get("expert_load") == theirs.get("expert_load")


@pytest.mark.parametrize("lost", [1, 0], ids=["the other", "where the launchers met"])
def test_a_lost_node_ends_the_other(both, nodes, tmp_path, lost):
    processes = both(LONG)
    wait_for(tmp_path / "build" / "nodes", 7, processes)
    kill(nodes[lost])
    began = time.monotonic()
    _, err = processes[1 - lost].communicate(timeout=60)
    assert time.monotonic() - began < 60 and processes[1 - lost].returncode == 1
    assert "another process has ended, or cannot be reached" in err and "--resume" in err
    assert (tmp_path / "build" / "nodes" / "state-000000005").is_dir()


def test_a_lost_worker_is_started_again_with_all_others(both, nodes, tmp_path):
    out, last = tmp_path / "build" / "nodes", 60
    processes = both(f" --steps {last} --save-every 5 --quiet",
                     lambda command: command.replace("--max-restarts 0", "--max-restarts 1"))
    wait_for(out, 7, processes)
    os.kill(ranks_in(nodes[1])[3], signal.SIGKILL)
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "resumed after step" in told[0][1]
    assert [entry["step"] for entry in log_of(out)] == list(range(1, last + 1))


def test_a_folder_that_one_node_does_not_see_is_refused(both, nodes, tmp_path):
    (tmp_path / "build").mkdir()
    processes = both(change=lambda command: "".join(      # a disk of its own, on the second alone
        ["mount -t tmpfs none build\n" * (command == COMMANDS[1]), command]))
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], told
    assert told[0].count("expected a file system that all nodes see") == 1
    assert not list((tmp_path / "build" / "nodes").glob("*state*"))
