# SPDX-License-Identifier: MIT
"""The command line: a file for each command, with its options; `__main__` joins them."""
