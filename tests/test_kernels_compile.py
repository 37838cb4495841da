# SPDX-License-Identifier: MIT
"""Every kernel compiles for its targets, with the budgets that the files of tests/audit promise.

No GPU is needed. `make audit` runs all of it; by default only two entries and the checks of the
checker itself run.
"""

import importlib
import re
from functools import cache

import pytest
from audit import machine_code

FILES = ("adamw8_update", "between_products", "flash_attention", "fp8_experts", "fp8_products",
         "grouped_experts", "latent_decode", "six_bit_decode", "write_rows")
ENTRIES = {(f"audit.{file}", entry.name): entry for file in FILES
           for entry in importlib.import_module(f"audit.{file}").ENTRIES}
# the first entry of these files stands for all in `make test`
REPRESENTED = ("audit.flash_attention", "audit.latent_decode")
FEW = [next(key for key in ENTRIES if key[0] == file)
       for file in REPRESENTED if any(key[0] == file for key in ENTRIES)]


@cache
def violations(module: str, *names: str) -> dict[str, list[str]]:
    return machine_code.audit_apart(module, names)


def keep_promises(module: str, name: str, *only: str) -> None:
    found = violations(module, *only)[name]
    assert not found, "\n".join([f"{module}: {name} for {ENTRIES[module, name].target}", *found])


@pytest.mark.parametrize(("module", "name"), FEW)
def test_a_representative_keeps_its_promises(module, name):
    keep_promises(module, name, name)


@pytest.mark.audit
@pytest.mark.parametrize(("module", "name"), list(ENTRIES))
def test_every_kernel_keeps_its_promises(module, name):
    keep_promises(module, name)


def test_every_entry_has_a_name_of_its_own_and_a_known_target():
    for module in {module for module, _ in ENTRIES}:
        entries = importlib.import_module(module).ENTRIES
        assert len({entry.name for entry in entries}) == len(entries), module
        assert {entry.target for entry in entries} == machine_code.CARDS.keys(), module


WRONG = {
    "good": [],
    "good_ampere": [],
    "good_amd": [],
    "good_chain": [],
    "spills": [r"stack: \d+ bytes, expected at most 0",
               r"loop at 0x\w+: \d+ loads and stores of spilled registers"],
    "spills_amd": [r"stack: \d+ bytes", r"loop at \.LBB\w+: \d+ loads and stores of spilled"],
    "repeats": [r"loop at .*: 196,608 matrix FLOPs .* expected 131,072 \(ratio 1.50, allowed 1.00"],
    "no_instruction": [r"HGMMA: not in the code, expected it \(found: nothing\)"],
    "other_instruction": [r"HGMMA: not in the code, expected it \(found: HMMA\)"],
    "too_many_blocks": [r"blocks a multiprocessor: 2 with \d+ registers a thread in 8 warps",
                        r"shared memory: 98,304 bytes, expected at most 76,800"],
    "too_much_shared": [r"shared memory: 163,840 bytes, expected at most 100,000"],
    "lost_buffers": [r"buffers: \(1,\), expected \(3,\)"],
    "bypasses": [r"loop at .*: \d+ plain loads from global memory, expected at most 0"],
    "narrow": [r"global memory: \d+ loads and stores, expected at most 30 \(.*STG.E\b",
               r"length: \d+ instructions, expected at most 300"],
    "few_registers": [r"registers: \d+ a thread, expected at most 80"],
    "surprise": [r"HGMMA: in the code, expected no matrix product"],
    "too_much_shared_amd": [r"shared memory: 98,304 bytes, expected at most 65,536"],
    "wrong_arguments": [r"does not compile: ValueError: arguments: \['K', 'b', 'c'\]"],
}
QUICK = ("good", "good_amd", "spills", "repeats", "no_instruction", "lost_buffers",
         "wrong_arguments")


def reported(found: dict[str, list[str]], name: str) -> None:
    """One line for each pattern, in order."""
    lines = found[name]
    assert len(lines) == len(WRONG[name]), lines
    for pattern, line in zip(WRONG[name], lines):
        assert re.match(pattern, line) and "\n" not in line, line


@pytest.mark.parametrize("name", QUICK)
def test_the_checker_reports(name):
    reported(violations("audit.toy_kernels", *QUICK), name)


@pytest.mark.audit
@pytest.mark.parametrize("name", list(WRONG))
def test_the_checker_reports_each_kind(name):
    reported(violations("audit.toy_kernels"), name)


def test_loops_are_found_in_machine_code():
    sass = """
        /*0a30*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0a40*/                   DEPBAR.LE SB0, 0x2 ;
        /*0a50*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0a60*/              @!P2 LDL R3, [R1+0x10] ;
        /*0a70*/              @!P0 BRA 0xa40 ;
        /*0a80*/                   LDS R2, [R3] ;
        /*0a90*/               @P1 BRA 0xa30 ;
        /*0aa0*/                   BRA 0xaa0;
"""
    lines = machine_code.sass_lines(sass)
    assert [op for _, op, _ in lines][-2:] == ["BRA", "BRA"] and len(lines) == 8
    (loop,) = machine_code.matrix_loops(lines, warps=8)      # the inner one alone
    assert loop.start == "0xa40" and loop.opcodes["LDL"] == 1 and "LDS" not in loop.opcodes
    assert loop.flops == 2 * 128 * 128 * 16


@pytest.mark.parametrize(("opcode", "flops"), [
    ("HMMA.16816.F32.BF16", 4 * 4096), ("HMMA.1688.F32.TF32", 4 * 2048),
    ("HGMMA.64x256x16.F32", 2 * 64 * 256 * 16), ("QGMMA.64x16x32.F32.E4M3.E4M3", 2 * 64 * 16 * 32),
    ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 4 * 4096),
    ("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16", 2 * 64 * 16 * 16),
    ("v_mfma_f32_32x32x8_bf16", 4 * 16384), ("v_mfma_f32_4x4x4_16b_f16", 4 * 2048),
])
def test_matrix_flops_of_four_warps(opcode, flops):
    assert machine_code.matrix_kind(opcode) in ("HMMA", "HGMMA", "QGMMA", "MFMA")
    assert machine_code.matrix_flops(opcode, warps=4) == flops
