# SPDX-License-Identifier: MIT
"""Right and wrong answers to the exercises, a file for each notebook: RIGHT and WRONG, by number.

At least three right ones, in forms that a student may choose, and five wrong ones.
"""
