"""Muon against torch's, against the published iteration in float64, and in two processes (gloo)."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Muon as TorchMuon

from unilatent.nets.layers import linear
from unilatent.training import muon
from unilatent.training.config import OptimizerConfig
from unilatent.training.memory import StorageCounter
from unilatent.training.muon import Muon, orthogonalise_, stacks
from unilatent.training.optimizer import Optimizers

SHAPES = [(64, 64), (64, 64), (96, 32), (32, 96), (5, 40), (40, 5), (64, 64), (96, 32), (1, 7)]
SETTINGS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """Random matrices whose singular values span 1.5 decades, of very different norms."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, parameter in enumerate(parameters):
        u, s, v = torch.linalg.svd(torch.randn(parameter.shape, generator=generator), full_matrices=False)
        parameter.grad = 10.0 ** (i % 5 - 3) * (u * torch.logspace(0, -1.5, len(s))) @ v


def published(u: Tensor, eps: float) -> Tensor:
    """The iteration as published, for one matrix."""
    x = u / max(float(u.norm()), eps)
    x = x.T if u.shape[0] > u.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def test_float32_is_the_published_formula() -> None:
    """Eight steps against float64: all shapes, weight decay, a learning rate that changes."""
    ours = weights()
    theirs = [p.detach().double() for p in ours]
    buffers = [torch.zeros_like(p) for p in theirs]
    optimizer = Muon(ours, **SETTINGS, precision="fp32")
    for step in range(8):
        rate = optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        set_gradients(ours, step)
        for p, buffer, parameter in zip(theirs, buffers, ours, strict=True):
            gradient = parameter.grad.double()
            buffer.mul_(0.9).add_(0.1 * gradient)
            p.mul_(1 - rate * 0.1)
            p.sub_(rate * 0.2 * max(p.shape) ** 0.5 * published(0.1 * gradient + 0.9 * buffer, 1e-7))
        optimizer.step()
    for parameter, p, buffer in zip(ours, theirs, buffers, strict=True):
        torch.testing.assert_close(parameter.detach().double(), p, atol=2e-5, rtol=0)
        torch.testing.assert_close(
            optimizer.state[parameter]["momentum_buffer"].double(), buffer, rtol=1e-5,
            atol=1e-7 * float(buffer.abs().max()),
        )  # fmt: skip


def test_bfloat16_is_torchs_muon_to_rounding() -> None:
    """Five steps, each from the same weights and momentum: updates as far from float64 as those of torch."""
    ours = weights()
    theirs = copy.deepcopy(ours)
    mine = Muon(ours, **SETTINGS, precision="bf16")
    other = TorchMuon(theirs, **SETTINGS, adjust_lr_fn="match_rms_adamw")
    rounding: list[tuple[float, float]] = []
    for step in range(5):
        before = [p.detach().double().mul(1 - 0.02 * 0.1) for p in ours]
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step()
        other.step()
        for a, b, p in zip(ours, theirs, before, strict=True):
            buffer = other.state[b]["momentum_buffer"]
            assert torch.equal(mine.state[a]["momentum_buffer"], buffer)
            exact = published(0.1 * b.grad.double() + 0.9 * buffer.double(), 1e-7)
            updates = [(p - x.detach()) / (0.02 * 0.2 * max(p.shape) ** 0.5) for x in (a, b)]
            one, two, apart = (
                float(difference.norm() / exact.norm())
                for difference in (updates[0] - exact, updates[1] - exact, updates[0] - updates[1])
            )
            rounding.append((one, two))
            assert two < 0.1 and apart < 2 * two + 2**-6
            a.data.copy_(b.data)
    one, two = torch.tensor(rounding).square().mean(0).sqrt().tolist()
    assert 0.8 * two < one < 1.2 * two


def test_eps_is_the_smallest_norm() -> None:
    """A matrix with a norm below eps is divided by eps, as in torch, so that its update shrinks; zero stays zero."""
    gradient = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    gradient /= gradient.norm()
    sizes = {}
    for norm, eps in ((1e-3, 1e-7), (1e-9, 1e-7), (1e-9, 1e-12), (0.0, 1e-7)):
        parameter, other = (nn.Parameter(torch.zeros(8, 12)) for _ in range(2))
        parameter.grad, other.grad = norm * gradient, norm * gradient
        Muon([parameter], 1.0, 0.95, eps=eps, precision="fp32").step()
        TorchMuon([other], 1.0, 0.0, momentum=0.95, eps=eps, adjust_lr_fn="match_rms_adamw").step()
        sizes[norm, eps] = float(parameter.detach().norm())
        assert float(other.detach().norm()) == pytest.approx(sizes[norm, eps], rel=0.05)
        direction = (1 - 0.95**2) * norm * gradient.double()
        exact = -0.2 * 12**0.5 * published(direction, eps)
        torch.testing.assert_close(parameter.detach().double(), exact, atol=1e-5, rtol=0)
    assert sizes[0.0, 1e-7] == 0 and sizes[1e-9, 1e-12] == pytest.approx(sizes[1e-3, 1e-7], rel=1e-4)
    assert sizes[1e-9, 1e-7] < 0.95 * sizes[1e-3, 1e-7]


def test_singular_values_become_about_one() -> None:
    x = torch.randn(3, 48, 80, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalise_(x.clone(), 1e-7))
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25
    tall = orthogonalise_(x.mT.contiguous(), 1e-7)
    torch.testing.assert_close(tall.mT, orthogonalise_(x.clone(), 1e-7), atol=1e-5, rtol=0)


def test_small_matrices_on_a_cpu_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By device: with and without instructions; an explicit precision is obeyed."""

    def dtype(precision: str, device: str, *shape: int) -> torch.dtype:
        optimizer = Muon([nn.Parameter(torch.zeros(1, 1))], 1.0, precision=precision)  # type: ignore[arg-type]
        optimizer.__dict__["device"] = torch.device(device)
        return optimizer.compute_dtype((shape[0], shape[1]))

    monkeypatch.setattr(muon, "prefers_bf16", lambda device: True)
    assert dtype("auto", "cpu", 64, 4096) == dtype("fp32", "cuda", 512, 512) == torch.float32
    assert dtype("auto", "cpu", 96, 96) == dtype("auto", "cuda", 8, 8) == torch.bfloat16
    monkeypatch.setattr(muon, "prefers_bf16", lambda device: False)
    assert dtype("auto", "cpu", 768, 768) == dtype("auto", "cuda", 768, 768) == torch.float32
    assert dtype("bf16", "cpu", 8, 8) == torch.bfloat16


def test_stacks_are_bounded_and_shared_by_cost() -> None:
    """Every matrix once; never more numbers than the limit; the same stacks for any number of processes."""
    shapes = ((768, 768),) * 27 + ((2304, 768),) * 24 + ((4096, 768),) * 12 + ((768, 3072),) * 24 + ((5000, 5000),) * 2
    one = stacks(shapes, 1)
    assert sorted(i for stack in one for i in stack.members) == list(range(len(shapes)))
    for stack in one:
        assert all(shapes[i] == stack.shape for i in stack.members)
        numbers = len(stack.members) * stack.shape[0] * stack.shape[1]
        assert numbers <= muon.LARGEST_STACK or len(stack.members) == 1
    for world in (2, 4):
        several = stacks(shapes, world)
        assert {stack.members for stack in several} == {stack.members for stack in one}
        load = Counter[int]()
        for stack in several:
            load[stack.owner] += stack.cost
        assert len(load) == world and max(load.values()) <= sum(load.values()) / world + max(s.cost for s in one)


def test_splitting_a_stack_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (2**24, 5000):
        monkeypatch.setattr(muon, "LARGEST_STACK", limit)
        muon.stacks.cache_clear()
        parameters = weights()
        set_gradients(parameters, 0)
        Muon(parameters, **SETTINGS, precision="fp32").step()
        results.append(parameters)
    muon.stacks.cache_clear()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_parameters_without_gradient_stay() -> None:
    parameters = weights()
    set_gradients(parameters, 0)
    parameters[1].grad = None
    before = parameters[1].detach().clone()
    optimizer = Muon(parameters, **SETTINGS)
    optimizer.step()
    assert torch.equal(parameters[1], before) and parameters[1] not in optimizer.state
    assert all("momentum_buffer" in optimizer.state[p] for p in parameters if p is not parameters[1])


def test_state_of_torchs_muon_goes_on() -> None:
    """Entries of a checkpoint written with torch's optimizers: the same names, loaded and continued."""
    model = nn.Sequential(linear(16, 24), linear(24, 8))
    config = OptimizerConfig(learning_rate=1e-2, momentum=0.9, muon_precision="bf16")
    theirs = copy.deepcopy(model)
    other = TorchMuon([theirs[0].weight, theirs[1].weight], 1e-2, 0.0, 0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([theirs[0].bias, theirs[1].bias], 1e-2, eps=1e-6, weight_decay=0.0, foreach=True)
    names = {p: name for name, p in theirs.named_parameters()}

    def step(optimizers: list, net: nn.Module, seed: int) -> None:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(seed))
        net.zero_grad()
        net(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    for seed in range(3):
        step([other, adamw], theirs, seed)
    stored = {
        f"{names[p]}|{key}": value.clone()
        for optimizer in (other, adamw) for p, state in optimizer.state.items() for key, value in state.items()
    }  # fmt: skip
    model.load_state_dict(theirs.state_dict())
    ours = Optimizers(model, config)
    for name, empty in ours.allocate(stored, "the other optimizers").items():
        empty.copy_(stored[name])
    assert set(ours.state()) == set(stored) and "0.weight|momentum_buffer" in stored
    for seed in range(3, 5):
        step([other, adamw], theirs, seed)
        step([ours], model, seed)
    continued = ours.state()
    for p, state in ((p, state) for optimizer in (other, adamw) for p, state in optimizer.state.items()):
        for key, value in state.items():
            difference = (continued[f"{names[p]}|{key}"] - value).norm()
            assert float(difference) < 0.03 * float(value.norm()), (names[p], key)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_of_a_step_is_as_predicted(precision: str) -> None:
    parameters = [nn.Parameter(torch.randn(128, 256)) for _ in range(6)]
    optimizer = Muon(parameters, 1e-2, precision=precision)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    with StorageCounter([*parameters, *(p.grad for p in parameters), *momenta_of(optimizer)]) as held:
        optimizer.step()
    predicted = optimizer.temporary_bytes(1, lambda p: False)
    assert 0.9 * held.most < predicted < 1.1 * held.most


def momenta_of(optimizer: Muon) -> list[Tensor]:
    return [entries["momentum_buffer"] for entries in optimizer.state.values()]


IN_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
sys.path.insert(0, sys.argv[1])
from test_muon import SETTINGS, set_gradients, weights
from unilatent.processes import Processes
from unilatent.training.muon import Muon

precision, cut, out = sys.argv[2:5]
processes = Processes("cpu", 60)
parameters = weights()
mesh = init_device_mesh("cpu", (processes.world,))
cuts = {"none": [], "all": range(len(parameters)), "some": [0, 3, 4, 5, 8]}[cut]
for i in cuts:
    parameters[i] = torch.nn.Parameter(distribute_tensor(parameters[i].detach(), mesh, [Shard(0)]))
calls = []
for name in ("all_to_all_single", "all_gather", "all_reduce", "broadcast"):
    def counted(*args, _call=getattr(dist, name), _name=name, **kwargs):
        calls.append(_name)
        return _call(*args, **kwargs)
    setattr(dist, name, counted)
optimizer = Muon(parameters, **SETTINGS, precision=precision)
for step in range(3):
    plain = weights()
    set_gradients(plain, step)
    for i, p in enumerate(parameters):
        p.grad = distribute_tensor(plain[i].grad, mesh, [Shard(0)]) if i in cuts else plain[i].grad
    if step == 2:
        calls.clear()
    optimizer.step()
made = sorted(calls)
momenta = [optimizer.state[p]["momentum_buffer"] for p in parameters]
assert all(isinstance(m, DTensor) == (i in cuts) for i, m in enumerate(momenta))
whole = [t.full_tensor() if isinstance(t, DTensor) else t.detach() for t in (*parameters, *momenta)]
torch.save((made, whole), f"{out}/{processes.rank}.pt")
processes.leave()
"""


@pytest.mark.parametrize(("cut", "world"), [("none", 2), ("all", 2), ("some", 2), ("some", 3)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_processes_agree_bitwise_with_one(tmp_path: Path, precision: str, cut: str, world: int) -> None:
    """Replicated and sharded (shards of unequal and of no rows), and few collectives a step."""
    alone = weights()
    optimizer = Muon(alone, **SETTINGS, precision=precision)
    for step in range(3):
        set_gradients(alone, step)
        optimizer.step()
    expected = [*(p.detach() for p in alone), *(optimizer.state[p]["momentum_buffer"] for p in alone)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
              "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    command = [sys.executable, "-c", IN_PROCESSES, str(Path(__file__).parent), precision, cut, str(tmp_path)]
    started = [
        subprocess.Popen(
            command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    for process in started:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors[-3000:]
    collectives = {"none": [], "all": ["all_to_all_single"] * 2, "some": ["all_to_all_single"] * 2}[cut]
    for rank in range(world):
        made, whole = torch.load(tmp_path / f"{rank}.pt")
        broadcasts = made.count("broadcast")  # of each process that owns replicated matrices
        assert 1 <= broadcasts <= world if cut != "all" else not broadcasts
        assert made == [*collectives, *["broadcast"] * broadcasts]
        assert all(torch.equal(a, b) for a, b in zip(whole, expected, strict=True))
