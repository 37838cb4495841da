# SPDX-License-Identifier: MIT
"""Which card is which, and what cannot run without one."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")            # before the first import of triton

import triton
from refusals import refused

from dsv2_ref.kernels.target import check_device, multiprocessors, on_its_device, target_of

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
CARDS = {
    "sm_80": [(8, 0)],                                        # A100
    "sm_90": [(9, 0), (10, 0), (10, 3)],                      # H100, B200, B300
    "consumer": [(8, 6), (8, 9), (12, 0), (12, 1), (7, 5)],   # RTX 30, 40, 50, DGX Spark, T4
}


@pytest.mark.parametrize(("name", "capability"),
                         [(name, x) for name, all_of_it in CARDS.items() for x in all_of_it])
def test_a_card_has_one_name(monkeypatch, name, capability):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert target_of(CUDA) == name


def test_amd_and_no_card(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert target_of(CUDA) == "gfx942" and target_of(CPU) == "cpu"     # torch calls AMD cuda too


def test_multiprocessors(monkeypatch):
    class Properties:
        multi_processor_count = 132

    multiprocessors.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert multiprocessors(CUDA) == 132 and multiprocessors(CPU) == 1
    multiprocessors.cache_clear()


def test_what_cannot_run_is_refused():
    x, compiled = torch.zeros(2), object.__new__(triton.JITFunction)
    check_device("x", x, None)
    check_device("x", x.half(), None)
    refused(lambda: check_device("x", x, compiled), "x: on cpu", "CUDA device",
            "TRITON_INTERPRET=1")
    refused(lambda: check_device("x", x.bfloat16(), None), "x: torch.bfloat16 on cpu", "float16")


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before

    class There:
        is_cuda = True

        def __init__(self, index):
            self.device = torch.device("cuda", index)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    launch = on_its_device(lambda x, more=0: (current[0], more))
    assert [launch(There(i), more=7) for i in (0, 1, 0, 2)] == [(0, 7), (1, 7), (0, 7), (2, 7)]
    assert current == [0] and launch(torch.zeros(1)) == (0, 0) and launch(x=There(3)) == (3, 0)
