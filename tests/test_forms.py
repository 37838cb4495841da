# SPDX-License-Identifier: MIT
"""The whole model on its kernels: the same logits, gradients and decoding as on the naive twins.

Without a GPU the kernels are forced onto the CPU, in Triton's interpreter.
"""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # before a kernel's module is imported

from dsv2_ref import forms
from dsv2_ref.config import TINY
from dsv2_ref.forms import KERNELS, Forms, choose, experts_form, kernel
from dsv2_ref.inference.fp8_model import quantise_model
from dsv2_ref.kernels.fp8 import dequantise, linear, quantise
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.moe.experts import experts_loop, experts_padded

# Triton 3.6's interpreter with numpy 2.3
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = TINY.with_(
    vocab=101, d=52, n_layers=2, n_h=3, d_h=10, d_r=6, d_v=14, d_c=20, d_cq=22, dense_width=58,
    n_shared=1, n_routed=8, top_k=3, expert_width=18, yarn_factor=4.0, yarn_original_positions=16,
    yarn_mscale=0.9, yarn_mscale_all_dim=0.5, max_positions=64, init_std=0.2,
)


@pytest.fixture
def ran(monkeypatch) -> Counter:
    """How often each kernel was given to the model; for whoever asks, on any device."""
    counts = Counter()

    def counting(*args, **more) -> Forms:
        chosen = choose(*args, **more)
        counts.update(chosen.names().split(", "))
        return chosen

    import dsv2_ref.model as assembly
    monkeypatch.setattr(assembly, "choose", counting)
    return counts


def use(monkeypatch, kernels: bool) -> None:
    if kernels:
        pytest.importorskip("triton")
    monkeypatch.setattr(forms, "kernels_serve", lambda x: kernels)


def model() -> DeepSeekV2:
    torch.manual_seed(0)
    return DeepSeekV2(CONFIG).to(DEVICE).eval()


def tokens(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch * length)
    return torch.randint(CONFIG.vocab, (batch, length), generator=generator).to(DEVICE)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_logits(monkeypatch, ran):
    m, x = model(), tokens(2, 13)
    outputs = []
    for kernels in (False, True):
        use(monkeypatch, kernels)
        outputs.append(m(x).detach())
    close(outputs[1], outputs[0])
    assert ran["attend_expanded"] == ran["attend_flash"] == 1 and ran["experts_fused"] == 1
    assert ran["select_device_limited_fused"] == 1


def test_losses_and_every_gradient_with_dropping(monkeypatch, ran):
    m, x = model().train(), tokens(2, 12)
    found = []
    for kernels in (False, True):
        use(monkeypatch, kernels)
        m.zero_grad()
        losses = m.losses(x, x.roll(-1, 1), with_load=True)
        losses.total.backward()
        assert losses.load[0].dropped > 0
        found.append((losses.total.detach(), [p.grad for p in m.parameters()]))
    close(found[1][0], found[0][0])
    largest = max(g.abs().max() for g in found[0][1])
    for got, expected in zip(found[1][1], found[0][1], strict=True):
        assert expected.abs().max() > 0
        assert (got - expected).abs().max() <= 1e-5 * largest
    assert ran["attend_flash"] == 1 and ran["experts_fused"] == 1


@pytest.mark.parametrize(("kind", "kernel"), [("latent", "attend_latent"),
                                              ("six_bit", "attend_six_bit")])
@torch.no_grad()
def test_cached_decoding_of_ragged_sequences(monkeypatch, ran, kind, kernel):
    m, prompt = model(), tokens(2, 11)
    outputs = []
    for kernels in (False, True):
        use(monkeypatch, kernels)
        cache = m.new_cache(2, 24, kind)
        parts = [m.head(m.hidden(prompt, cache, lengths=[11, 7]))[:, :7]]     # the real ones
        parts += [m(tokens(2, n), cache) for n in (1, 2, 1)]
        outputs.append(torch.cat(parts, 1))
    close(outputs[1], outputs[0])
    assert ran[kernel] == 3 and ran["attend_flash"] == 1 and ran["expert_rows"] == 4
    assert ran["route_fused"] == 3 and ran["select_device_limited_fused"] == 1     # 22 tokens


@torch.no_grad()
def test_losses_without_a_gradient_drop_what_training_drops(monkeypatch, ran):
    m, x, found = model().train(), tokens(2, 12), []
    for kernels in (False, True):
        use(monkeypatch, kernels)
        losses = m.losses(x, x.roll(-1, 1), with_load=True)
        assert losses.load[0].dropped > 0
        found.append(losses.total)
    close(found[1], found[0])
    assert ran["expert_rows"] == 1


def said(words: str) -> dict[str, list[str]]:
    """What `describe` says of each door."""
    doors = words.split("; ")[1:]
    return {door.split(": ")[0]: door.split(": ")[1].split(", ") for door in doors}


def test_without_a_gpu_the_twins_run_and_the_model_says_so():
    assert said(model().cpu().describe()) == {
        "training": ["attend_expanded", "select_device_limited", "experts_padded"],
        "prompt": ["attend_expanded", "select_device_limited", "experts_padded"],
        "decode": ["attend_absorbed", "select_device_limited", "experts_loop"]}


def test_with_kernels_the_model_says_so(monkeypatch):
    use(monkeypatch, True)
    assert said(model().describe()) == {
        "training": ["attend_flash", "select_device_limited_fused", "experts_fused"],
        "prompt": ["attend_flash", "select_device_limited_fused", "expert_rows"],
        "decode": ["attend_latent", "route_fused", "expert_rows"]}
    greedy = DeepSeekV2(CONFIG.with_(n_devices=1, max_devices=None, alpha_device=0.0,
                                     alpha_comm=0.0))
    assert said(greedy.describe())["prompt"][1] == "select_greedy_fused"


@pytest.mark.filterwarnings("ignore:Mismatch dtype")         # of torch's norms under autocast
def test_each_door_runs_what_is_said_of_it(monkeypatch, ran):
    """Under autocast too, where training has kernels that the cached doors have not."""
    use(monkeypatch, True)
    m = model()
    for cast in (False, True):
        with torch.autocast(DEVICE, torch.float16, enabled=cast):
            words = said(m.describe())
            x = tokens(2, 9)                 # more than one program routes
            for door in ("training", "prompt", "decode"):
                ran.clear()
                if door == "training":
                    m.losses(x, x)
                else:
                    cache = m.new_cache(2, 16)
                    with torch.no_grad():
                        m(x, cache)
                        ran.update() if door == "prompt" else (ran.clear(), m(x[:, :1], cache))
                assert set(ran) == set(words[door]), (cast, door)
        assert words["training"][0] == "attend_flash"
        assert (words["prompt"][0] == "attend_expanded") == cast


def test_a_greedy_model_runs_its_selection_kernel(monkeypatch, ran):
    greedy = DeepSeekV2(CONFIG.with_(n_devices=1, max_devices=None, alpha_device=0.0,
                                     alpha_comm=0.0)).to(DEVICE).eval()
    outputs = []
    for kernels in (False, True):
        use(monkeypatch, kernels)
        outputs.append(greedy(tokens(2, 13)).detach())
    close(outputs[1], outputs[0])
    assert ran["select_greedy"] == ran["select_greedy_fused"] == 1


@torch.no_grad()
def test_a_model_in_fp8_runs_on_its_kernels(monkeypatch, ran):
    """Prompts and decoding; the twins without kernels, with a gradient and under autocast."""
    m, x = quantise_model(model()), tokens(2, 9)
    outputs = []
    for kernels in (False, True):
        use(monkeypatch, kernels)
        cache = m.new_cache(2, 16)
        outputs.append(torch.cat([m(x, cache), m(x[:, :1], cache)], 1))
    close(outputs[1], outputs[0])
    assert ran["experts_fp8"] == 2 and not ran["experts_fused"]
    words = said(m.describe())
    assert words["prompt"][2] == words["decode"][2] == "experts_fp8"
    assert words["FP8 layers"] == ["linear_fp8 below 512 rows", "then dequantised"]
    with torch.enable_grad():
        assert said(m.describe())["training"][2] == "experts_padded"
    with torch.autocast(DEVICE, torch.float16):
        words = said(m.describe())
        assert words["decode"][2] == "experts_loop" and words["FP8 layers"] == ["dequantised"]
    use(monkeypatch, False)
    words = said(m.describe())
    assert words["decode"][2] == "experts_loop" and words["FP8 layers"] == ["dequantised"]


def test_which_products_of_fp8_layers_have_kernels(monkeypatch):
    """Few rows without a gradient; the whole matrix, where it is asked for, always."""
    pytest.importorskip("triton")
    asked = []

    def noting(twin):
        return lambda *args: asked.append(twin.__name__) or twin(*args)

    monkeypatch.setattr(forms, "kernel", noting)
    codes, scale = quantise(torch.randn(7, 5))
    for kernels, grad, rows, expected in (
            (True, False, 511, ["linear"]), (True, False, 512, ["dequantise"]),
            (True, True, 3, ["dequantise"]), (False, False, 3, [])):
        use(monkeypatch, kernels)
        x = torch.randn(rows, 5)
        with torch.set_grad_enabled(grad):
            y = forms.multiply_fp8(x, codes, scale)
        assert asked == expected and torch.equal(y, linear(x, codes, scale))
        asked.clear()
    use(monkeypatch, True)
    assert torch.equal(forms.read_fp8(codes, scale, torch.float16),
                       dequantise(codes, scale, torch.float16)) and asked == ["dequantise"]


def test_every_twin_has_a_kernel_of_its_own_kind():
    pytest.importorskip("triton")
    assert {kernel(twin).__name__ for twin in KERNELS} == {
        "attend_flash", "attend_latent", "attend_six_bit", "select_greedy_fused",
        "select_device_limited_fused", "experts_fused", "linear_fp8", "dequantise_fp8",
        "experts_fp8", "rotate_both_fused", "swiglu_fused", "add_norm_fused",
        "add_up_fused", "write_latent_fused", "write_six_bit_fused"}


def test_what_has_no_gradient_or_is_for_one_rank_is_not_taken_elsewhere(monkeypatch):
    use(monkeypatch, True)
    x, names = torch.zeros(1, device=DEVICE), [
        "rotate_both", "swiglu", "add_norm", "add_up", "route"]

    def fused(**more) -> set[str]:
        found = choose(CONFIG, x, 1, 16, 16, **more)
        plain = Forms(found.attend, found.select, found.experts)
        return {name for name in names if getattr(found, name) is not getattr(plain, name)}

    assert fused() == {"rotate_both"}
    with torch.no_grad():
        assert fused() == set(names)
        assert fused(alone=False) == fused(W_gate=[]) == {"rotate_both", "swiglu", "add_norm"}
        assert choose(CONFIG, x, 1, 17, 17).route is None
        with torch.autocast(DEVICE, torch.float16):
            assert fused() == {"rotate_both"}


def test_a_cache_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="cache: rows of kind 'per_head', expected 'latent'"):
        choose(CONFIG, torch.zeros(1), 1, 1, 5, "per_head")


@pytest.mark.parametrize(("n_tokens", "form"), [
    (1, "experts_loop"), (5, "experts_loop"), (6, "experts_grouped"), (600, "experts_grouped")])
def test_the_loop_serves_few_slots_alone(n_tokens, form):
    """Up to twice as many slots as experts: 8 experts, top 3, so 5 tokens (15 slots), not 6."""
    c = CONFIG.with_(d=64, expert_width=16)
    assert experts_form(c, torch.zeros(1), n_tokens, None).__name__ == form
    assert experts_form(c, torch.zeros(1).double(), 6, None) is experts_padded
    assert experts_form(CONFIG.with_(expert_width=17), torch.zeros(1), 6, None) is experts_padded
    with torch.autocast("cpu", torch.bfloat16):
        assert experts_form(c, torch.zeros(1), 6, None) is experts_padded


def test_which_tensors_kernels_serve(monkeypatch):
    pytest.importorskip("triton")

    class Like:
        def __init__(self, device: str, dtype: torch.dtype) -> None:
            self.device, self.dtype = torch.device(device), dtype

    monkeypatch.setattr(forms, "_run_on", lambda device: True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert forms.kernels_serve(Like("cuda:0", dtype))
        assert not forms.kernels_serve(Like("cpu", dtype))
    assert not forms.kernels_serve(Like("cuda", torch.float64))
    monkeypatch.setattr(forms, "find_spec", lambda name: None)
    assert not forms.kernels_serve(Like("cuda", torch.bfloat16))


def test_where_no_kernel_can_be_launched_twins_serve_and_one_warning_says_why(monkeypatch):
    """As on a machine without a C compiler: Triton is there, and its first launch fails."""
    def broken(s, top_k):
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nenvironment")

    device = torch.device(DEVICE)
    monkeypatch.setattr(forms, "kernel", lambda twin: broken)
    forms._run_on.cache_clear()
    with pytest.warns(UserWarning, match="place .RuntimeError: Failed to .* via CC environment"):
        assert not forms._run_on(device)
    assert not forms._run_on(device)                     # and no second warning
    forms._run_on.cache_clear()


def test_where_a_twin_stays_though_there_is_a_kernel(monkeypatch):
    use(monkeypatch, True)
    x = torch.zeros(1, device=DEVICE)

    def attend(T: int, cached: str | None) -> str:
        return choose(CONFIG, x, 1, T, 40, cached).attend.__name__

    # decoding that wants a gradient
    assert attend(1, "latent") == "attend_absorbed" and attend(1, "six_bit") == "attend_packed"
    with torch.no_grad():
        assert attend(1, "latent") == "attend_latent" and attend(1, "six_bit") == "attend_six_bit"
        with torch.autocast(DEVICE, torch.float16):
            assert attend(1, "latent") == "attend_absorbed"
            assert attend(1, "six_bit") == "attend_packed"
            assert attend(40, "latent") == attend(40, "six_bit") == "attend_expanded"
            assert attend(40, None) == "attend_flash"


@pytest.mark.filterwarnings("ignore:Mismatch dtype")         # of torch's norms under autocast
def test_training_under_autocast(monkeypatch, ran):
    """Half precision in the matrices only: near the fp32 losses, and a gradient for all."""
    m, x = model().train(), tokens(2, 12)
    use(monkeypatch, False)
    expected = m.losses(x, x).total
    use(monkeypatch, True)
    with torch.autocast(DEVICE, torch.float16):
        losses = m.losses(x, x).total
    losses.backward()
    close(losses, expected, 2e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    assert ran["experts_fused_autocast"] == 1 and ran["attend_flash"] == 1


def test_experts_under_autocast_multiply_in_its_dtype(monkeypatch):
    use(monkeypatch, True)
    g = torch.Generator().manual_seed(0)
    x, gate, up, down = (torch.randn(*shape, generator=g).to(DEVICE) for shape in
                         ((5, 12), (3, 10, 12), (3, 10, 12), (3, 12, 10)))
    indices = torch.tensor([[0, 2], [1, 2], [0, 1], [0, 2], [2, 1]], device=DEVICE)
    gates = torch.rand(5, 2, generator=g).to(DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        form = experts_form(CONFIG, x, len(x), gate)
        out = form(x, indices, gates, gate, up, down)
    assert out.dtype == torch.float16
    close(out.float(), experts_loop(x, indices, gates, gate, up, down), 5e-3)


def test_the_package_works_where_triton_does_not_exist():
    """And on a CPU nothing imports it where it does."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from dsv2_ref.config import TINY
from dsv2_ref.inference.generate import generate
from dsv2_ref.model import DeepSeekV2
model = DeepSeekV2(TINY)
generate(model, torch.zeros(1, 3, dtype=torch.int64), 2)
model.losses(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64))
print(model.describe())
from dsv2_ref.inference.fp8_model import quantise_model
generate(quantise_model(model), torch.zeros(1, 3, dtype=torch.int64), 2)
print(model.describe())
assert not any(name.startswith("dsv2_ref.kernels.") and name != "dsv2_ref.kernels.fp8"
               for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=False)
    assert done.returncode == 0, done.stderr
    assert "attend_expanded" in done.stdout and "FP8 layers: dequantised" in done.stdout


@pytest.mark.parametrize("n_routed,top_k,few", [(160, 6, 53), (64, 6, 21), (8, 3, 5)])
def test_the_loop_is_taken_while_it_reads_fewer_experts_than_there_are(n_routed, top_k, few):
    """V2's and Lite's numbers, and others: below two slots an expert on average."""
    c = CONFIG.with_(d=16, expert_width=24, n_routed=n_routed, top_k=top_k, n_devices=1,
                     max_devices=None)
    for dtype, best in ((torch.float32, "experts_grouped"), (torch.float64, "experts_padded")):
        for n, form in ((1, "experts_loop"), (few, "experts_loop"), (few + 1, best),
                        (99 * few, best)):
            assert experts_form(c, torch.zeros(1, dtype=dtype), n, None).__name__ == form, n
