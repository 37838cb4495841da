# SPDX-License-Identifier: MIT
"""Measurements, each against a real peer in the same run."""
