"""Both formulas of every operation that computes differently on an eager CPU and elsewhere: equal values and gradients.

`elsewhere` runs on CPU tensors what a GPU would run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unilatent
from unilatent.nets import branches
from unilatent.nets.attention import Attention, attend
from unilatent.nets.byte_encoder import ByteEncoder
from unilatent.nets.convnet import UViT
from unilatent.nets.embeddings import halves, rotary, rotate_complex, rotate_halves, rotate_real
from unilatent.nets.layers import EagerAffine, EagerRMSNorm, EagerSiLUTimes, LayerNorm, RMSNorm, fused_rms_norm
from unilatent.nets.lpips import FewPassDistance, feature_distance, unit
from unilatent.nets.transformer import PlainTransformer, Transformer
from unilatent.types import Conditioning, Layout, encode_texts, grid_layout

D, N = 32, 16
TIME = torch.tensor([0.2, 0.9])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
"""Two of five condition tokens are padding in both rows."""
LAYOUT = Layout(grid_layout((4, 4)).positions, torch.arange(N) < torch.tensor([[16], [10]]))


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to run, from then on, the formulas of a GPU."""
    return lambda: monkeypatch.setattr(branches, "on_cpu", lambda x: False)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor, autocast: bool = False) -> list[Tensor]:
    """The output, and the gradients of its product with fixed normals."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(*inputs)
    weight = normals(*out.shape, seed=7)
    return [out.detach(), *torch.autograd.grad((out.float() * weight).sum(), inputs)]


def assert_close(pairs: tuple[list[Tensor], list[Tensor]], tolerance: float) -> None:
    """tolerance: of each entry, relative to the largest of its tensor."""
    for a, b in zip(*pairs, strict=True):
        assert a.dtype == b.dtype and a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(a.abs().max()))


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float32, False, 2e-6), (torch.bfloat16, False, 0.015), (torch.bfloat16, True, 0.015)],
)
@pytest.mark.parametrize("shape", [(4, 20, 64), (2, 3, 7, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, autocast: bool, tolerance: float):
    x, weight = (3 * normals(*shape)).to(dtype), 1 + 0.3 * normals(shape[-1], seed=1)
    pairs = tuple(
        with_gradients(lambda x, w, f=f: f(x, w, 1e-6), x, weight, autocast=autocast)
        for f in (EagerRMSNorm.apply, fused_rms_norm)
    )
    assert pairs[0][0].dtype == dtype and pairs[0][2].dtype == torch.float32
    assert_close(pairs, tolerance)
    exact = with_gradients(lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), x.double(), weight.double())
    for outputs in pairs:
        assert_close(([out.double() for out in outputs], exact), tolerance)


@pytest.mark.parametrize("eps", [1e-5, 5e-6])
def test_a_wrong_eps_of_rms_norm_shows(eps: float):
    x, weight = 0.1 * normals(4, 64), torch.ones(64)
    difference = (fused_rms_norm(x, weight, eps) - fused_rms_norm(x, weight, 1e-6)).abs().max()
    assert difference > 100 * (fused_rms_norm(x, weight, 1e-6) - EagerRMSNorm.apply(x, weight, 1e-6)).abs().max()


def test_rms_norm_is_not_left_to_autocast(monkeypatch: pytest.MonkeyPatch, elsewhere: Callable[[], None]):
    """CUDA's autocast would convert x to float32, and unlike types of x and weight have no fused kernel."""
    calls = []

    def recorded(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
        calls.append((torch.is_autocast_enabled("cpu"), x.dtype, weight.dtype))
        return x * weight

    elsewhere()
    monkeypatch.setattr(F, "rms_norm", recorded)
    norm = RMSNorm(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(normals(2, 8).bfloat16()).dtype == torch.bfloat16
        assert norm(normals(2, 8)).dtype == torch.float32
    assert calls == [(False, torch.bfloat16, torch.bfloat16), (False, torch.float32, torch.float32)]


@pytest.mark.parametrize("axes", [1, 2])
def test_rotate(axes: int):
    """On queries as attention cuts them from a fused projection, with large angles."""
    qkv, rotation = normals(2, 5, 3, 4, 16), rotary(200 * normals(2, 5, axes, seed=1), 16)
    formulas = (
        lambda x: rotate_complex(x, rotation), lambda x: rotate_real(x, *rotation),
        lambda x: rotate_halves(halves(x.unflatten(-1, (-1, 2))), rotation).unflatten(-1, (2, -1)).mT.flatten(-2),
    )  # fmt: skip
    first, *others = (with_gradients(lambda qkv, f=f: f(qkv.permute(2, 0, 3, 1, 4)[1]), qkv) for f in formulas)
    for other in others:
        assert_close((first, other), 1e-6)


def test_rotate_turns_pairs_by_their_position():
    """A closed form: the first pair turns by one radian per position."""
    x, positions = normals(1, 1, 7, 8), torch.arange(7.0)
    for formula in (rotate_complex, lambda x, rotation: rotate_real(x, *rotation)):
        pairs = formula(x, rotary(positions[None, :, None], 8)).unflatten(-1, (-1, 2))[0, 0, :, 0]  # (7, 2)
        want = torch.view_as_complex(x.unflatten(-1, (-1, 2)))[0, 0, :, 0] * torch.exp(1j * positions)
        torch.testing.assert_close(torch.view_as_complex(pairs.contiguous()), want)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("axes", [1, 2])
def test_attention_by_halves(axes: int, qk_norm: bool, elsewhere: Callable[[], None]):
    """Attention weights do not depend on the order of channels; gradients of all weights too are equal."""
    torch.manual_seed(0)
    layer, x, rotation = Attention(D, 2, qk_norm, xavier=True), normals(2, 7, D), rotary(normals(2, 7, axes), D // 2)
    if qk_norm:
        layer.q_norm.weight.data, layer.k_norm.weight.data = 1 + 0.3 * normals(2, D // 2, seed=1)
    names, weights = zip(*layer.named_parameters(), strict=True)
    function = lambda x, *weights: torch.func.functional_call(  # noqa: E731
        layer, dict(zip(names, weights, strict=True)), (x, rotation, torch.arange(7) < torch.tensor([[7], [4]]))
    )
    on_cpu = with_gradients(function, x, *weights)
    elsewhere()
    assert_close((on_cpu, with_gradients(function, x, *weights)), 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
def test_affine(whole: bool, dtype: torch.dtype):
    """Modulation and gated residuals; the hand-written gradient is torch's."""
    x, factor, offset = (normals(*shape, seed=i).to(dtype) for i, shape in enumerate(
        [(3, 5, 8), (3, 1, 8), (3, 5, 8) if whole else (3, 1, 8)]
    ))  # fmt: skip
    pairs = tuple(
        with_gradients(f, x, factor, offset) for f in (EagerAffine.apply, lambda x, f, o: torch.addcmul(o, x, f))
    )
    assert_close(pairs, 1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_times(dtype: torch.dtype):
    x = normals(3, 5, 8).to(dtype)
    formulas = (EagerSiLUTimes.apply, lambda x: F.silu(x[..., :4]) * x[..., 4:])
    assert_close(tuple(with_gradients(f, x) for f in formulas), 1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_feature_distance(dtype: torch.dtype, tolerance: float, memory_format: torch.memory_format):
    """Through the ReLU before, with a dead pixel. In bfloat16 the plain formula computes in float32."""
    a = normals(2, 64, 6, 5)
    b = a + 0.2 * normals(2, 64, 6, 5, seed=1)
    a[0, :, 2, 3] = -1
    weight, inputs = normals(64, seed=2).abs(), [x.to(dtype, memory_format=memory_format) for x in (a, b)]

    def plain(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return (unit(a) - unit(b)).square().mean(dim=(2, 3)) @ weight

    pairs = tuple(
        with_gradients(lambda a, b, f=f: f(a.relu(), b.relu(), weight), *inputs) for f in (plain, FewPassDistance.apply)
    )
    assert pairs[1][0].dtype == torch.float32 and all(t.isfinite().all() for t in pairs[1])
    assert_close(pairs, tolerance)
    assert_close((pairs[0][:1], pairs[1][:1]), 2e-3)
    of_a = with_gradients(lambda a: FewPassDistance.apply(a.relu(), inputs[1].relu(), weight), inputs[0])
    assert torch.equal(of_a[1], pairs[1][1])  # without a gradient of b, as in training


def test_which_feature_distance_runs(monkeypatch: pytest.MonkeyPatch):
    """Evaluation is in float32, so it keeps the plain formula."""
    ran: list[torch.dtype] = []
    monkeypatch.setattr(FewPassDistance, "apply", lambda a, b, weight: ran.append(a.dtype))
    (a, b), weight = normals(2, 1, 8, 4, 4), torch.ones(8)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        feature_distance(a.to(dtype), b.to(dtype), weight)
    assert ran == [torch.bfloat16]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert feature_distance(a.bfloat16(), b.bfloat16(), weight).dtype == torch.float32 and len(ran) == 1


def test_layer_norm_keeps_the_type(elsewhere: Callable[[], None]):
    """CUDA's autocast would convert to float32 and back, in two more passes over memory."""
    norm = LayerNorm(32)
    norm.weight.data, norm.bias.data = 1 + 0.3 * normals(32, seed=1), normals(32, seed=2)
    x = (3 * normals(4, 32)).bfloat16()
    on_cpu = with_gradients(norm, x, autocast=True)
    elsewhere()
    out = with_gradients(norm, x, autocast=True)
    assert out[0].dtype == torch.bfloat16
    assert_close((on_cpu, out), 0.02)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_in_bfloat16(autocast: bool, masked: bool, elsewhere: Callable[[], None]):
    inputs = [part.bfloat16() for part in normals(3, 2, 4, N, 8)]
    function = lambda q, k, v: attend(q, k, v, LAYOUT.mask if masked else None)  # noqa: E731
    on_cpu = with_gradients(function, *inputs, autocast=autocast)
    elsewhere()
    assert_close((on_cpu, with_gradients(function, *inputs, autocast=autocast)), 0.02)
    assert_close((on_cpu, [t.bfloat16() for t in with_gradients(function, *(x.float() for x in inputs))]), 0.02)


def test_which_branch_runs(monkeypatch: pytest.MonkeyPatch, elsewhere: Callable[[], None]):
    """By `on_cpu`, by compilation, and by the type of x for the complex products."""
    ran: list[str] = []
    for place in (
        "layers.fused_rms_norm", "embeddings.rotate_complex", "embeddings.rotate_real", "attention.rotate_halves",
    ):  # fmt: skip
        name = place.partition(".")[2]
        monkeypatch.setattr(f"unilatent.nets.{place}", lambda x, *args, name=name: ran.append(name) or x)
    norm, x, rotation = RMSNorm(8), normals(1, 3, 8), rotary(torch.arange(3.0)[None, :, None], 4)
    attentions = [Attention(8, 2, qk_norm=False, xavier=True).to(dtype) for dtype in (torch.float32, torch.bfloat16)]

    def run() -> list[str]:
        ran.clear()
        norm(x)
        for attention in attentions:
            attention(x.to(attention.proj.weight.dtype), rotation)
        return list(ran)

    assert run() == 2 * ["rotate_complex"] + 2 * ["rotate_halves"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert run() == ["fused_rms_norm"] + 4 * ["rotate_real"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    elsewhere()
    assert run() == ["fused_rms_norm"] + 4 * ["rotate_halves"]
    assert not branches.can_read(x)


def randomised(make: Callable[[], nn.Module]) -> nn.Module:
    """A network with random weights everywhere, as after training: a new one returns zeros."""
    torch.manual_seed(0)
    net = make()
    for p in net.parameters():
        p.data = torch.randn(p.shape) / max(1, math.prod(p.shape[1:])) ** 0.5 + (p.ndim == 1)
    return net.eval()


VECTOR, TOKENS = normals(2, D, seed=9), normals(2, 5, D, seed=8)
COND, TEXT = Conditioning(VECTOR), Conditioning(VECTOR, TOKENS, MASK)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor], int]] = {
    "transformer": (
        lambda: Transformer(D, 2, 4, 5, in_context_tokens=3, in_context_start=1),
        lambda net, x: net(x, grid_layout((4, 4)), TIME, COND), D,
    ),
    "transformer, padded, with condition tokens": (
        lambda: Transformer(D, 2, 4, 5, in_context_tokens=3, in_context_start=1, reads_tokens=True),
        lambda net, x: net(x, LAYOUT, TIME, TEXT)[LAYOUT.mask], D,
    ),
    "plain transformer": (lambda: PlainTransformer(D, 2, 4, 64), lambda net, x: net(x, LAYOUT.mask)[LAYOUT.mask], D),
    "U-ViT with condition tokens": (
        lambda: UViT(4, [8, D], [1, 2], 1, (1, 1), [(2, 2)], D, heads=2, reads_tokens=True),
        lambda net, x: net(x, grid_layout((4, 4)), TIME, TEXT), 4,
    ),
}  # fmt: skip


def run(name: str, autocast: bool = False) -> list[Tensor]:
    """Output, gradient of the input, and gradients of all weights in one vector (a few are rounding alone)."""
    make, call, channels = NETWORKS[name]
    net, x = randomised(make), normals(2, N, channels).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = call(net, x)
    assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
    loss = (out.float() * normals(*out.shape, seed=7)).sum()
    gradient, *gradients = torch.autograd.grad(loss, [x, *net.parameters()])
    return [out.detach(), gradient, torch.cat([g.flatten() for g in gradients])]


def errors(outputs: list[Tensor], exact: list[Tensor]) -> Tensor:
    """Relative error in norm of each tensor."""
    return torch.stack([(a - b).norm() / b.norm() for a, b in zip(outputs, exact, strict=True)])


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_float32(name: str, elsewhere: Callable[[], None]):
    on_cpu = run(name)
    elsewhere()
    assert_close((on_cpu, run(name)), 1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_bfloat16(name: str, elsewhere: Callable[[], None]):
    """Rounding adds up over layers, so both are compared with float32: neither is much less exact than the other."""
    exact, on_cpu = run(name), run(name, autocast=True)
    elsewhere()
    cpu_errors, gpu_errors = errors(on_cpu, exact), errors(run(name, autocast=True), exact)
    assert (cpu_errors > 0).all() and (cpu_errors < 0.15).all() and (gpu_errors < 2 * cpu_errors).all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["transformer, padded, with condition tokens", "U-ViT with condition tokens"])
def test_networks_compile_as_one_graph(name: str, backend: str):
    """No branch breaks the graph; the condition's mask is not read while compiling."""
    make, call, channels = NETWORKS[name]
    net, x = randomised(make), normals(2, N, channels)
    want = with_gradients(lambda x: call(net, x), x)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    assert_close((want, with_gradients(lambda x: call(compiled, x), x)), 1e-5)


def test_trimming_condition_tokens_changes_no_result(elsewhere: Callable[[], None]):
    """The two columns of padding hold large values; untrimmed they are attended to by nobody."""
    net = randomised(lambda: Transformer(D, 2, 4, 5, reads_tokens=True))
    lengths = []
    net.blocks[0].register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
    cond = Conditioning(VECTOR, TOKENS + 100 * ~MASK[..., None], MASK)
    x, layout = normals(2, N, D), grid_layout((4, 4))
    out = net(x, layout, TIME, cond)
    elsewhere()
    torch.testing.assert_close(net(x, layout, TIME, cond), out, rtol=0, atol=1e-5)
    assert lengths == [N + 3, N + 5]


def test_bytes_without_counting_pieces(elsewhere: Callable[[], None]):
    torch.manual_seed(0)
    encoder, values = ByteEncoder(16, 2, 2), encode_texts(["a small red circle", "photosynthesis is, slow", ""])
    vectors, mask, mean = encoder(values, 9)
    assert vectors.shape[1] == 5
    elsewhere()
    again = encoder(values, 9)
    assert again[0].shape[1] == 9 and torch.equal(again[1][:, :5], mask) and not again[1][:, 5:].any()
    torch.testing.assert_close(again[0][:, :5], vectors, rtol=0, atol=1e-5)
    torch.testing.assert_close(again[2], mean, rtol=0, atol=1e-5)


def test_no_other_file_chooses_by_device_or_compilation():
    """But for pinned memory, which changes no number."""
    folder = Path(unilatent.__file__).parent
    files = {
        path.name: path.read_text(encoding="utf-8") for path in [*(folder / "nets").glob("*.py"), folder / "types.py"]
    }
    files.pop("branches.py")
    choices = [
        (name, line.strip())
        for name, text in files.items()
        for line in text.splitlines()
        if re.search(r"is_compiling|\.type [!=]= |\.is_cuda", line) and "pin_memory" not in line
    ]
    assert choices == [("types.py", 'return data.to(device, non_blocking=torch.device(device).type != "cpu")')]
