# SPDX-License-Identifier: MIT
"""Wrong variants of the kernels of fp8_products.py, and the test that must fail for each."""

from mutants import Mutant

FILE = "kernels/fp8_products.py"
_matrix = "test_fp8_products.py::test_equals_the_matrix_written_out"
_codes = "test_fp8_products.py::test_every_code_is_read_exactly"
_assembly = "test_fp8_products.py::test_the_assembly_reads_every_code_exactly"
_split = "test_fp8_products.py::test_blocks_split_among_programs_give_the_same_sum"
_input = "test_fp8_products.py::test_quantised_input_equals_its_twin"
_whole = "test_fp8_products.py::test_dequantised_is_the_twin_to_the_bit"


def _wrong(name: str, old: str, new: str, node: str = _matrix) -> Mutant:
    return Mutant(name, "fp8", FILE, old, new, node)


KERNEL_MUTANTS = [
    _wrong("scale_of_the_first_block", "tl.minimum(step + 1, STEPS - 1) * BK // 128)",
           "tl.minimum(step + 1, 0) * BK // 128)"),
    _wrong("scale_of_the_first_rows", "    scale += i // 128 * C\n", ""),
    _wrong("scale_on_the_whole_sum", "acc += s * tl.dot(a, w.T, input_precision",
           "acc = s * tl.dot(a, w.T, acc, input_precision"),
    _wrong("scale_one_step_late", "s = tl.load(scale + first * BK // 128)\n", "s = 1.0\n"),
    _wrong("last_row_of_x_lost", "read_some(x, rows, rows < M,",
           "read_some(x, rows, rows < M - 1,"),
    _wrong("last_column_lost", "tl.load(at, mask=(columns < width)[None], other=0.0)",
           "tl.load(at, mask=(columns < width - 1)[None], other=0.0)"),
    _wrong("last_output_not_stored", "acc.to(out.dtype.element_ty), mask=(rows < M)[:, None] & "
           "(outputs < r)[None])\n\n\n@triton.jit(do_not_specialize=[\"n\"])",
           "acc.to(out.dtype.element_ty), mask=(rows < M)[:, None] & "
           "(outputs < r - 1)[None])\n\n\n@triton.jit(do_not_specialize=[\"n\"])"),
    _wrong("signs_forgotten", "<< 20 & -0x78100000", "<< 20 & 0x07F00000", _codes),
    _wrong("bias_of_e5m2", "1.329227995784916e36", "5.192296858534828e33", _codes),
    _wrong("a_bit_of_mantissa_lost", "& -0x78100000", "& -0x78000000", _codes),
    _wrong("bytes_of_a_register_swapped", '"0x9180", "0xB3A2"', '"0x8091", "0xB3A2"', _assembly),
    _wrong("codes_not_signed", '"0x9180", "0xB3A2"', '"0x4140", "0x4342"', _assembly),
    _wrong("assembly_shifts_by_3", "(4, 0x87F0, 0x7B80", "(3, 0x87F0, 0x7B80", _assembly),
    _wrong("assembly_without_a_mask", "(4, 0x87F0, 0x7B80", "(4, 0xFFFF, 0x7B80", _assembly),
    _wrong("zeros_lose_their_sign", "mov.b32 z, {0x8000 * pair}", "mov.b32 z, 0", _assembly),
    _wrong("one_part_left_out", "tl.static_range(SPLITS)", "tl.static_range(1, SPLITS)", _split),
    _wrong("parts_overlap", "tl.minimum(first + EACH * (128 // BK), STEPS)",
           "tl.minimum(first + 1 + EACH * (128 // BK), STEPS)", _split),
    _wrong("scale_of_input_forgotten", "(s * s_x)[:, None]", "s", _input),
    _wrong("scale_of_input_of_another_row", "s_x = tl.load(x_scale + inside * C + ",
           "s_x = tl.load(x_scale + inside * 0 + ", _input),
    _wrong("scales_of_the_first_matrix", "(e * R + tl.program_id(0)", "(0 * R + tl.program_id(0)",
           _whole),
]
