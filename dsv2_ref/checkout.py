# SPDX-License-Identifier: MIT
"""What lies beside the package in a checkout, and not in an installed wheel: data/, tests/."""

from pathlib import Path

PACKAGE = Path(__file__).parent


def is_checkout(folder: Path) -> bool:
    """Whether `folder` is a checkout of this repository (or its unpacked sdist), and no other."""
    file = folder / "pyproject.toml"
    return file.is_file() and 'name = "dsv2-ref"' in file.read_text(encoding="utf-8").splitlines()


def in_checkout(name: str) -> Path:
    """`name`, as data/model, in the checkout that the package or the current folder belongs to.

    ValueError where there is none, as in an installed wheel far from a checkout.
    """
    here = Path.cwd()
    for folder in (PACKAGE.parent, here, *here.parents):
        if is_checkout(folder):
            return folder / name
    raise ValueError(f"{name}: not part of an installed dsv2_ref, expected a checkout of the "
                     "repository (run from it, or pip install -e there)")
