# SPDX-License-Identifier: MIT
"""DeepSeekMoE, one file per concept.

  routing   which experts a token goes to, and with what weight
  experts   shared and routed experts, three equal forms
  balance   the three balance losses
  dropping  what a full device drops in training
"""
