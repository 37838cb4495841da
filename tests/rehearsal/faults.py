# SPDX-License-Identifier: MIT
"""Mistakes that were made once and that a CPU did not show: put back, a promise breaks.

Those of a first reading of the kernels and their surroundings that neither memory, launches, waits
nor compilation show have tests of their own; `ELSEWHERE` says which.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    file: str          # of dsv2_ref/
    old: str           # occurs once
    new: str
    promise: str
    says: str          # what a line about it matches


FAULTS = [
    Fault("blocks run again stay alive", "block.py",
          "            return self._balance_of(s, indices)\n",
          "            self.found = [*getattr(self, 'found', []), self._balance_of(s, indices)]\n"
          "            return self.found[-1]\n",
          "run again", "GB above"),
    Fault("a plan that holds what it counted", "training/memory.py",
          "tensor, storage = tensor.detach(), tensor.untyped_storage()",
          "storage = tensor.untyped_storage()", "step", "peak"),
    Fault("dropping asks how many slots there are", "moe/dropping.py",
          "device.new_zeros(n_devices).scatter_add_(0, device, torch.ones_like(device))",
          "torch.bincount(device, minlength=n_devices)", "V2 drops", "bincount"),
    Fault("losses read one by one", "training/trainer.py",
          "    values = torch.stack([t.double() for t in scalars.values()]).tolist()",
          "    values = [t.item() for t in scalars.values()]", "step", "waits"),
]

ELSEWHERE: dict[str, str] = {}
