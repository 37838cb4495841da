# SPDX-License-Identifier: MIT
"""Make .venv or leave it as it is: `python .ci/environment.py [EXTRAS]`, the start of every target.

It is made anew where it does not run, has a Python that is too old, or was made in another place
(its scripts name the folder). Packages are installed where something that pyproject.toml and
constraints.txt ask for is not there, and only then: without a network the rest goes on working.
Written for Python 3.6 and later, so that it can say that one is too old.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys

OLDEST = (3, 11)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def python_of(venv):
    place = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return os.path.join(venv, *place)


def settings(venv):
    """pyvenv.cfg as a dict; ValueError where `venv` is something else."""
    path = os.path.join(venv, "pyvenv.cfg")
    if os.path.islink(venv) or not os.path.isfile(path):
        raise ValueError(f"{venv}: a link or without pyvenv.cfg, expected a virtual environment "
                         "or nothing")
    with open(path, encoding="utf-8") as file:
        pairs = (line.partition("=") for line in file)
        return {key.strip(): value.strip() for key, _, value in pairs}


def fault(venv):
    """Why an environment cannot be used, or None."""
    made = settings(venv)
    place = re.search(r" ((?:/|[A-Za-z]:\\).*)$", made.get("command", "").rpartition(" -m venv")[2])
    if place and os.path.realpath(place[1]) != os.path.realpath(venv):
        return "was made as " + place[1]
    try:
        show = "import sys; print(*sys.version_info[:2])"
        version = subprocess.check_output([python_of(venv), "-c", show], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return "does not run"
    major, minor = map(int, version.split())
    return f"has Python {major}.{minor}" if (major, minor) < OLDEST else None


def wanted(root, extras):
    """What the stamp of a finished environment says: its place, and what was asked for."""
    digest = hashlib.sha256(extras.encode())
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(root, name), "rb") as file:
            digest.update(file.read())
    return f"{root} {digest.hexdigest()}\n"


def missing(root, extras):
    """What is asked for and not there, as names; runs in the environment itself."""
    import tomllib
    from importlib import metadata, util

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    with open(os.path.join(root, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    asked = list(project["dependencies"])
    for extra in filter(None, extras.split(",")):
        asked += project["optional-dependencies"][extra]
    with open(os.path.join(root, "constraints.txt"), encoding="utf-8") as file:
        lines = [line.split("#")[0].strip() for line in file]
    exact = {canonicalize_name(r.name): r.specifier for r in map(Requirement, filter(None, lines))}
    found = []
    for requirement in map(Requirement, asked):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        both = requirement.specifier & exact.get(canonicalize_name(requirement.name), "")
        try:
            if not both.contains(metadata.version(requirement.name), prereleases=True):
                found.append(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(requirement.name)
    spec = util.find_spec("dsv2_ref")
    ours = os.path.join(root, "dsv2_ref", "__init__.py")
    if spec is None or os.path.realpath(spec.origin or "") != os.path.realpath(ours):
        found.append("dsv2_ref")
    return found


def complete(venv, root, extras):
    """Whether all that is asked for is there."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python_of(venv), os.path.abspath(__file__), "--missing", root, extras],
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.returncode == 0 and not done.stdout.strip()


def build(venv):
    major, minor = sys.version_info[:2]
    if (major, minor) < OLDEST:
        raise ValueError(f"{sys.executable}: Python {major}.{minor}, expected 3.11 or later; "
                         "another one is taken with make PYTHON=python3.11")
    if os.path.lexists(venv):
        shutil.rmtree(venv)
    if subprocess.call([sys.executable, "-m", "venv", venv]):
        raise ValueError(f"{venv}: not made, expected a Python with venv (Debian: python3-venv)")


def ready(root, extras="notebooks,test", asked=False):
    """`asked`: this Python was named by the user, so say where the environment has another."""
    venv, stamp = os.path.join(root, ".venv"), os.path.join(root, ".venv", "ready")
    why = fault(venv) if os.path.lexists(venv) else ""
    if why is not None:
        if why:
            print(f".venv {why}: making it anew", file=sys.stderr)
        build(venv)
    version = settings(venv).get("version", "")
    if asked and version.split(".")[:2] != [str(n) for n in sys.version_info[:2]]:
        print(f".venv has Python {version}, which is used; `make clean` first for another",
              file=sys.stderr)
    if os.path.exists(stamp):
        with open(stamp, encoding="utf-8") as file:
            if file.read() == wanted(root, extras):
                return
    if not complete(venv, root, extras):
        pip = [python_of(venv), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.call([*pip, "-c", "constraints.txt", "-e", f".[{extras}]"], cwd=root):
            raise ValueError(".venv: pip could not install what is asked for (see above)")
    with open(stamp, "w", encoding="utf-8") as file:
        file.write(wanted(root, extras))


if __name__ == "__main__":
    options = [option for option in sys.argv[1:] if option != "--asked"]
    if options[:1] == ["--missing"]:
        print(" ".join(missing(*options[1:])))
        sys.exit()
    try:
        ready(ROOT, *options, asked="--asked" in sys.argv)
    except ValueError as error:
        sys.exit(str(error))
