# SPDX-License-Identifier: MIT
"""Alignment: from a base model to a chat model (section 4).

  sandbox           one program in a process of its own, and what became of it
  sandbox_launcher  how that process shuts itself in before it becomes the program
"""
