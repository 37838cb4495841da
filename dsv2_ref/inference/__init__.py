# SPDX-License-Identifier: MIT
"""Using a trained model: generation."""
