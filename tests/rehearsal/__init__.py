# SPDX-License-Identifier: MIT
"""A rehearsal on a card that is not there: full-size commands run to their end on a CPU.

Tensors on the card are fake: they have shape, dtype, strides and device, and no numbers. Host
tensors are real. Everything that torch would do on the card is seen on its way and counted; a
Triton kernel is not run, its launch is checked: devices, alignment, integer widths, grid, tensor
descriptors, and, if asked, what exactly this specialisation compiles to for the card.

  card      the pretended card: what torch asks of it, and who waits for it
  launches  Triton's launches, checked, and compiled for sm_90 if asked
  counts    what torch launches, uploads and allocates
  parts     what is rehearsed, each part a function that returns numbers
  promises  what must hold of them: tests/test_rehearsal.py the fast ones, tests/rehearse.py all
  expected  what to expect on a card, from what was counted
  faults    mistakes that were made once, put back, and the promise that each breaks

`python -m rehearsal '["decode", {"preset": "v2"}]'` (from tests/) prints a part's numbers as JSON;
the tests run it so, in a process of its own: the pretence cannot be taken back, and conftest.py
makes kernels interpreted ones.

What cannot be known this way: any number on the card, so nothing that depends on values (which
experts are full); time; what libraries take for themselves, and the allocator's fragments. A torch
operation counts as one launch, though a few (sort, cumsum, a large reduction) are several.

It stands on private names of torch and triton: `VERSIONS` are those that it was made for; on
others the tests are skipped and say so.
"""

VERSIONS = {"torch": ("2.11", "2.13"), "triton": ("3.6", "3.7")}
