# SPDX-License-Identifier: MIT
"""What `checkpoint` stands on: tensors read from files, files written whole."""
