# SPDX-License-Identifier: MIT
"""The command line, a file a command; `__main__` reads the options."""
