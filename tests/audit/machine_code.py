# SPDX-License-Identifier: MIT
"""What a Triton kernel compiles to, judged without a GPU.

`triton.compile` makes real machine code for a named target on any machine. An `Entry` names a
kernel, the sizes to compile it for, and its budget; `audit` compiles it and gives one line for each
thing that is not as promised:

  1. spills: the stack is empty (resource usage lists it as STACK; LOCAL reads 0 whatever is
     spilled), and no loop that multiplies matrices loads or stores local memory;
  2. registers and 3. shared memory leave room for the intended blocks a multiprocessor;
  4. every innermost loop that multiplies matrices does as many FLOPs an iteration as its equation
     needs. The compiler may silently let several warps repeat one product. Counted in PTX, for
     the assembler unrolls small loops; what it makes of them must be whole multiples;
  5. those loops use the intended matrix instruction and no other;
  6. the software pipeline has the intended number of buffers;
  7. memory is read and written in as few and as wide pieces as intended, by as short a program.

On AMD the assembly text is read: MFMA, scratch memory, vector registers and LDS bytes.

Kernels are named "module:function": a test process may run under Triton's interpreter, the audit
never does. `audit_apart` runs it in a process of its own, which is also the command line:

    python tests/audit/machine_code.py audit.latent_decode NAME...    (no name: all of its ENTRIES)
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Card:
    """What a program (one block of threads) shares with its neighbours on one multiprocessor."""

    backend: str
    arch: int | str
    warp: int
    shared_block: int         # bytes, most one block may have
    shared_all: int           # bytes, for all blocks of a multiprocessor
    shared_reserved: int      # bytes the system takes for each block


CARDS = {
    "sm_90": Card("cuda", 90, 32, 232_448, 233_472, 1024),
    "sm_80": Card("cuda", 80, 32, 166_912, 167_936, 1024),
    "gfx942": Card("hip", "gfx942", 64, 65_536, 65_536, 0),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One kernel at one set of sizes, and what it may take.

    `signature` has every argument that is no constexpr, as Triton writes types: "*bf16", "i32",
    "fp32", "tensordesc<bf16[64, 512]>". Pointers count as aligned to 16 bytes, as torch's are;
    "i32:16" is a number known to be a multiple of 16, "*bf16:1" a pointer that is not aligned. A
    number that is 1 at launch is a constexpr for Triton: put it there.
    """

    name: str
    kernel: str                                   # "dsv2_ref.kernels.latent_decode:decode_kernel"
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    target: str = "sm_90"                         # or sm_80, gfx942
    options: dict[str, Any] = dataclasses.field(default_factory=dict)      # others of the compiler
    instruction: str | None = None                # HGMMA, HMMA or MFMA; None: no matrix product
    flops: int | tuple[int, ...] | None = None    # 2·m·n·k of all products an iteration of a loop;
                                                  # several: each loop has one of them
    ratio: float = 1.0                            # of those, what the loop may do at most
    ctas: int = 1                                 # intended blocks a multiprocessor
    registers: int | None = None                  # a thread; None: what the blocks leave
    shared: int | None = None                     # bytes a block; None: what the blocks leave
    stack: int = 0                                # bytes of spills outside the loops that are fine
    buffers: int | tuple[int, ...] | None = None  # of the pipelined tiles; several: sorted
    plain_loads: int | None = None                # most loads in a loop that bypass the pipeline
    accesses: int | None = None                   # most loads and stores of global memory, in all
    length: int | None = None                     # most instructions, in all
    scratch: int = 0                              # bytes of global scratch; 128 a descriptor


@dataclasses.dataclass
class Loop:
    """A matrix loop: where it starts, its instructions, and the FLOPs of all warps in it."""

    start: str
    opcodes: Counter
    flops: int


@dataclasses.dataclass
class Code:
    """What was read from the machine code."""

    stack: int
    registers: int
    loops: list[Loop]         # of machine code
    iterations: list[Loop]    # the same as the compiler wrote them, before the assembler unrolls
    opcodes: Counter


def compiled(entry: Entry) -> Any:
    """Triton's compiled kernel for the entry's target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = entry.kernel.split(":")
    fn, card = getattr(importlib.import_module(module), name), CARDS[entry.target]
    given, wanted = entry.signature.keys() | entry.constexprs.keys(), set(fn.arg_names)
    if given != wanted:
        raise ValueError(f"arguments: {sorted(given ^ wanted)} given or expected, not both")
    signature, attributes = {}, {}
    for i, argument in enumerate(fn.arg_names):
        kind, _, multiple = entry.signature.get(argument, "constexpr").partition(":")
        signature[argument] = kind
        if multiple == "16" or (kind.startswith("*") and not multiple):
            attributes[i,] = [["tt.divisibility", 16]]
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages, **entry.options}
    return triton.compile(ASTSource(fn, signature, entry.constexprs, attributes),
                          target=GPUTarget(card.backend, card.arch, card.warp), options=options)


def audit(entry: Entry) -> list[str]:
    """Every broken promise in one line each; empty if all is well."""
    try:
        kernel = compiled(entry)
    except Exception as error:                    # of any kind: that too is a result
        return [f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    code = read_amd(kernel) if entry.target == "gfx942" else read_nvidia(kernel)
    return [*_spills(entry, code), *_room(entry, code, kernel.metadata),
            *_matrices(entry, code), *_pipeline(entry, code, kernel), *_traffic(entry, code)]


def _spills(entry: Entry, code: Code) -> list[str]:
    wrong = []
    if code.stack > entry.stack:
        gave_up = " (the assembler gave up: try another --register-usage-level)"
        wrong.append(f"stack: {code.stack} bytes, expected at most {entry.stack}"
                     + gave_up * (code.registers == 32))
    for loop in code.loops:
        local = sum(n for op, n in loop.opcodes.items()
                    if op.startswith(("LDL", "STL", "scratch_")))
        if local:
            wrong.append(f"loop at {loop.start}: {local} loads and stores of spilled registers, "
                         f"expected none")
    return wrong


def _room(entry: Entry, code: Code, metadata: Any) -> list[str]:
    wrong, card = [], CARDS[entry.target]
    if metadata.num_warps != entry.num_warps:
        wrong.append(f"warps: {metadata.num_warps}, expected {entry.num_warps}")
    if entry.registers is not None and code.registers > entry.registers:
        wrong.append(f"registers: {code.registers} a thread, expected at most {entry.registers}")
    rounded = -(-max(code.registers, 1) // 8) * 8
    if card.backend == "hip":                     # 512 registers in each of four units
        blocks = 4 * min(512 // rounded, 8) // entry.num_warps
    else:
        blocks = 65_536 // (rounded * 32 * entry.num_warps)
    if blocks < entry.ctas:
        wrong.append(f"blocks a multiprocessor: {blocks} with {code.registers} registers a thread "
                     f"in {entry.num_warps} warps, expected {entry.ctas}")
    most = min(card.shared_block, card.shared_all // entry.ctas - card.shared_reserved)
    most = most if entry.shared is None else min(most, entry.shared)
    if metadata.shared > most:
        wrong.append(f"shared memory: {metadata.shared:,} bytes, expected at most {most:,} "
                     f"(blocks a multiprocessor: {entry.ctas})")
    scratch = getattr(metadata, "global_scratch_size", 0)
    if scratch != entry.scratch:
        wrong.append(f"global scratch: {scratch} bytes, expected {entry.scratch}")
    return wrong


def _matrices(entry: Entry, code: Code) -> list[str]:
    wrong, kind = [], entry.instruction
    found = {k for op in code.opcodes if (k := matrix_kind(op))}
    if kind is None:
        return [f"{k}: in the code, expected no matrix product" for k in sorted(found)]
    if kind not in found:
        return [f"{kind}: not in the code, expected it (found: {', '.join(found) or 'nothing'})"]
    if entry.flops is None:
        return []
    if not code.loops:
        return [f"{kind}: in no loop, expected one"]
    for loop in code.loops:
        for other in sorted({k for op in loop.opcodes if (k := matrix_kind(op))} - {kind}):
            wrong.append(f"loop at {loop.start}: {other}, expected {kind} alone")
        if all(loop.flops % one.flops for one in code.iterations):
            wrong.append(f"loop at {loop.start}: {loop.flops:,} matrix FLOPs, expected a multiple "
                         f"of what PTX asks for")
    allowed = entry.flops if isinstance(entry.flops, tuple) else (entry.flops,)
    for loop in code.iterations:
        if not any(one <= loop.flops <= one * entry.ratio for one in allowed):
            nearest = min(allowed, key=lambda one: abs(loop.flops / one - 1))
            wrong.append(
                f"loop at {loop.start}: {loop.flops:,} matrix FLOPs an iteration, expected "
                f"{nearest:,} (ratio {loop.flops / nearest:.2f}, allowed {entry.ratio:.2f})")
    return wrong


def _pipeline(entry: Entry, code: Code, kernel: Any) -> list[str]:
    wrong = []
    if entry.buffers is not None:
        expected = entry.buffers if isinstance(entry.buffers, tuple) else (entry.buffers,)
        found = buffers(kernel.asm["ttgir"])
        if found != tuple(sorted(expected)):
            wrong.append(f"buffers: {found or 'none'}, expected {tuple(sorted(expected))}")
    if entry.plain_loads is not None:
        for loop in code.iterations:
            n = sum(count for op, count in loop.opcodes.items() if op.startswith("ld.global"))
            if n > entry.plain_loads:
                wrong.append(f"loop at {loop.start}: {n} plain loads from global memory, expected "
                             f"at most {entry.plain_loads}")
    return wrong


def _traffic(entry: Entry, code: Code) -> list[str]:
    wrong, kinds = [], ("LDG", "STG", "global_load", "global_store")
    found = {op: n for op, n in sorted(code.opcodes.items()) if op.startswith(kinds)}
    if entry.accesses is not None and sum(found.values()) > entry.accesses:
        names = ", ".join(f"{n} {op}" for op, n in found.items())
        wrong.append(f"global memory: {sum(found.values())} loads and stores, expected at most "
                     f"{entry.accesses} ({names})")
    length = sum(n for op, n in code.opcodes.items() if op and not op.startswith(("NOP", "s_nop")))
    if entry.length is not None and length > entry.length:
        wrong.append(f"length: {length} instructions, expected at most {entry.length}")
    return wrong


def buffers(ttgir: str) -> tuple[int, ...]:
    """The different numbers of buffers of the pipelined tiles; barriers (i64) do not count."""
    tile = r"ttg\.local_alloc(?: \{[^}]*\})? : \(\) -> !ttg\.memdesc<(\d+)x[\dx]+x(\w+)"
    found = re.findall(tile, ttgir)
    return tuple(sorted({int(n) for n, kind in found if kind != "i64"}))


def matrix_kind(opcode: str) -> str | None:
    """Of machine code: HGMMA, HMMA, IMMA, ... or MFMA. Of PTX: the same two, as they translate."""
    if opcode.startswith("v_mfma"):
        return "MFMA"
    if opcode.startswith(("mma.sync", "wgmma.mma_async")):
        return "HMMA" if opcode.startswith("mma") else "HGMMA"
    name = opcode.split(".")[0]
    return name if name.endswith("MMA") else None


def matrix_flops(opcode: str, warps: int) -> int:
    """2·m·n·k that one instruction means when all the warps of a block execute it."""
    if opcode.startswith("v_mfma"):               # v_mfma_f32_4x4x4_16b_f16 is 16 blocks of 4x4x4
        m, n, k, blocks = re.search(r"_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?", opcode).groups(default="1")
        return 2 * int(m) * int(n) * int(k) * int(blocks) * warps
    if ptx := re.search(r"\.m(\d+)n(\d+)k(\d+)", opcode):
        m, n, k = map(int, ptx.groups())
    elif (shape := opcode.split(".")[1]).startswith("168"):
        m, n, k = 16, 8, int(shape[3:])           # 16816 is 16x8x16
    else:
        m, n, k = map(int, shape.split("x"))      # 64x128x16, by four warps together
    return 2 * m * n * k * warps // (4 if m == 64 else 1)


def matrix_loops(lines: list[tuple[str, str, str | None]], warps: int) -> list[Loop]:
    """Lines of (place, opcode, place jumped to) -> the innermost loops with a matrix product."""
    where = {place: i for i, (place, _, _) in enumerate(lines)}
    last: dict[int, int] = {}                     # first line of a loop -> its last
    for i, (_, _, to) in enumerate(lines):
        if to is not None and where.get(to, i) < i:
            last[where[to]] = max(i, last.get(where[to], 0))
    spans = [(a, b) for a, b in last.items() if any(matrix_kind(op) for _, op, _ in lines[a:b + 1])]
    # an outer loop may also begin inside an inner one, whose first part it then repeats by itself
    inner = [(a, b) for a, b in spans
             if not any(a <= d < b or (d == b and a < c) for c, d in spans)]
    loops = []
    for a, b in sorted(inner):
        opcodes = Counter(op for _, op, _ in lines[a:b + 1])
        flops = sum(n * matrix_flops(op, warps) for op, n in opcodes.items() if matrix_kind(op))
        loops.append(Loop(lines[a][0], opcodes, flops))
    return loops


def read_nvidia(kernel: Any) -> Code:
    """Resource usage and SASS, read with the tools in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (subprocess.run([tool, option, file.name], capture_output=True, text=True,
                                      check=True).stdout
                       for option in ("--dump-resource-usage", "--dump-sass"))
    lines, warps = sass_lines(sass), kernel.metadata.num_warps
    stack, registers = (max(map(int, re.findall(rf"\b{what}:(\d+)", usage)))
                        for what in ("STACK", "REG"))
    return Code(stack, registers, matrix_loops(lines, warps),
                matrix_loops(text_lines(kernel.asm["ptx"]), warps),
                Counter(op for _, op, _ in lines))


def sass_lines(sass: str) -> list[tuple[str, str, str | None]]:
    """/*0a40*/ @!P0 BRA 0x120 ; -> ("0xa40", "BRA", "0x120")"""
    found = []
    pattern = r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    for place, opcode, rest in re.findall(pattern, sass, re.M):
        jump = re.findall(r"0x[0-9a-f]+", rest) if opcode.startswith("BRA") else []
        found.append((hex(int(place, 16)), opcode, jump[-1] if jump else None))
    return found


def read_amd(kernel: Any) -> Code:
    """The assembly text and its own notes on resources."""
    text = kernel.asm["amdgcn"]
    lines = text_lines(text.split(".amdhsa_kernel")[0])
    stack, registers = (int(re.search(rf"\.amdhsa_{what}\s+(\d+)", text).group(1))
                        for what in ("private_segment_fixed_size", "next_free_vgpr"))
    loops = matrix_loops(lines, kernel.metadata.num_warps)
    return Code(stack, registers, loops, loops, Counter(op for _, op, _ in lines))


def text_lines(text: str) -> list[tuple[str, str, str | None]]:
    """PTX or AMD assembly: labels and instructions; a label is the place of its own line."""
    found = []
    for i, line in enumerate(text.splitlines()):
        if label := re.match(r"\s*(\$?\.?L\w+):", line):
            found.append((label.group(1), "", None))
        elif code := re.match(r"\s+(?:@!?%p\d+\s+)?([a-z][\w.:]*)\b\s*([^;]*)", line):
            opcode, rest = code.groups()
            jump = re.search(r"\$?\.?L\w+", rest) if re.match(r"bra|s_c?branch", opcode) else None
            found.append((str(i), opcode, jump.group() if jump else None))
    return found


def audit_apart(module: str, names: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Violations of a module's ENTRIES by name, from a process that compiles for real."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS), str(TESTS.parent), *filter(None, [environment.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run([sys.executable, __file__, module, *names], text=True, check=False,
                              env=environment | {"TRITON_CACHE_DIR": cache}, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"audit of {module} stopped: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(module: str, names: list[str]) -> None:
    entries = importlib.import_module(module).ENTRIES
    print(json.dumps({e.name: audit(e) for e in entries if not names or e.name in names}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
