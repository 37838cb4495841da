# SPDX-License-Identifier: MIT
"""Which card a kernel runs on, said once for all kernels of this folder.

A kernel computes the same on every card, and is fast only with tiles that fit the card: its shared
memory per block, its registers per thread, its matrix instruction. So each kernel file has a table
of tiles, and here is the list of the names that stand in such a table:

  sm_90      Hopper (H100, H200): 227 KB of shared memory per block, tensor descriptors, wgmma. Also
             the Blackwell cards of data centres (B200, B300), which have as much memory and a
             larger matrix unit: Hopper's tiles compile for them, more is not known.
  sm_80      Ampere of data centres (A100): 163 KB.
  consumer   All other CUDA cards, with 99 KB or less: RTX 30, 40 and 50 (Blackwell too, capability
             12), L40, RTX PRO. A kernel whose tiles for sm_80 fit into 99 KB takes those.
  gfx942     AMD (MI300): 64 KB, 64 threads per warp. Other cards of AMD have not been tried.
  cpu        No card: Triton's interpreter, which runs a kernel in numpy to test it.

Triton decides at the moment a kernel is defined whether it is compiled or interpreted
(TRITON_INTERPRET=1). A compiled kernel on a CPU tensor ends in an error of Triton's that names
neither; and the interpreter keeps bfloat16 as integers, so that sums come out wrong, by any factor,
without a word. `check_device` refuses both in one line.

A launch goes to the *current* CUDA device, not to that of its tensors: with several cards in one
process it would read memory that is not there. What launches is decorated with `on_its_device`.

Shapes: none.
Copy with: nothing.  Needs: torch, triton.

Wiring, once copied:
    import torch
    from target import multiprocessors, target_of
    x = torch.randn(40, 64)
    rows = {"sm_90": 128, "sm_80": 64}.get(target_of(x.device), 16)      # of a tile, by the card
    programs = min(multiprocessors(x.device), -(-len(x) // rows))
"""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
import triton
from torch import Tensor

# compute capability -> target; what is not here is a consumer card
CARDS = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_90", (10, 3): "sm_90"}


def target_of(device: torch.device) -> str:
    """Whose tiles a device takes: "sm_90", "sm_80", "consumer", "gfx942" or "cpu"."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return "gfx942"
    return CARDS.get(torch.cuda.get_device_capability(device), "consumer")


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many there are; a CPU counts as one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_device(name: str, x: Tensor, kernel: object) -> None:
    """ValueError if `kernel`, as it was defined, cannot run on the argument `name`, x."""
    if x.is_cuda:
        return
    if isinstance(kernel, triton.JITFunction):
        raise ValueError(f"{name}: on {x.device}, expected a CUDA device, or TRITON_INTERPRET=1 "
                         "set before this module is imported")
    if x.dtype == torch.bfloat16:
        raise ValueError(f"{name}: {x.dtype} on {x.device}, expected a CUDA device, or float16 or "
                         "float32, for Triton's interpreter computes wrongly in bfloat16")


def on_its_device(function: Callable) -> Callable:
    """`function` with the device of its first argument, a tensor, as the current one."""

    @wraps(function)
    def there(*args: object, **kwargs: object) -> object:
        x = args[0] if args else next(iter(kwargs.values()))             # or given by name
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(x.device):
            return function(*args, **kwargs)

    return there
