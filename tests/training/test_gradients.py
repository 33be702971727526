"""Sums of gradients over processes (gloo): what is summed, when it starts, and in which order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_in_ranks
from torch import Tensor, nn

from unilatent.processes import Processes
from unilatent.training.gradients import GradientSums

LAYERS, WIDTH = 6, 8


class Net(nn.Module):
    """Two chains of layers, a layer that nothing reads and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        self.second = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def parts(self, x: Tensor) -> list[Tensor]:
        """Two parts of a loss, of which the second reads the first chain too."""
        return [self.first(x).square().mean(), self.second(self.frozen(self.first(x))).square().mean()]


def batches(step: int, num: int) -> list[Tensor]:
    return list(torch.randn(num, 3, WIDTH, generator=torch.Generator().manual_seed(step)))


class Watched:
    """Notes the all-reduces that are started, after how many backward passes, and after how many contributions."""

    def __init__(self, sums: GradientSums):
        self.sums, self.passes = sums, 0
        self.log: list[tuple[int, int, int]] = []
        self.call = dist.all_reduce
        dist.all_reduce = self.noted

    def noted(self, tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        self.log.append((self.passes, sum(self.sums.seen), tensor.numel()))
        return self.call(tensor, *arguments, **named)


def take(sums: GradientSums, micro: list[list[Tensor]], watched: Watched | None = None) -> None:
    """A step: each micro-batch is a list of losses."""
    sums.model.zero_grad(set_to_none=True)
    sums.start()
    if watched is not None:
        watched.passes, watched.log = 0, []
    for i, parts in enumerate(micro):
        if i == len(micro) - 1:
            sums.last_micro_batch()
        for part in parts:
            sums.next_backward()
            part.backward()
            if watched is not None:
                watched.passes += 1
    sums.finish()
    late = torch.tensor(float(len(sums.late)))
    if sums.processes.world > 1:
        dist.all_reduce(late)
    sums.complete(float(late), [float(there) for there in sums.absent.values()])


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def expected(losses: Any) -> dict[str, Tensor | None]:
    """Gradients of one process that computes all losses."""
    net = Net()
    for loss in losses(net):
        loss.backward()
    return gradients(net)


def assert_equal(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def whole_steps(processes: Processes) -> Any:
    """Steps of two micro-batches, of which rank 1 has only one: the order of starts, and gradients."""
    net = Net()
    sums = GradientSums(net, processes, bucket=WIDTH * WIDTH)
    watched, found = Watched(sums), []
    for step in range(3):
        mine = batches(step, 3)[:2] if processes.is_main else batches(step, 3)[2:]
        take(sums, [net.parts(x) for x in mine], watched)
        found.append((watched.log[:-1], gradients(net)))
    return found


def test_sums_are_those_of_one_process_and_start_before_backward_ends(ranks: list[Any]) -> None:
    """Buckets leave in the second of the two backward passes, one by one, in the same order in both processes; the
    first step, which learns the order, sums everything at the end."""
    steps = zip(*(rank["steps"] for rank in ranks), strict=True)
    for step, ((log, found), (other_log, other)) in enumerate(steps):
        wanted = expected(lambda net, step=step: [p for x in batches(step, 3) for p in net.parts(x)])
        assert_equal(found, wanted)
        assert_equal(other, wanted)
        assert found["unused.weight"] is None and found["frozen.weight"] is None
        sizes = [size for *_, size in log]
        assert sizes == [size for *_, size in other_log] and len(sizes) > LAYERS
        for passes, starts in ((4, log), (2, other_log)):  # over the micro-batches of this process
            finished, arrived = {at for at, *_ in starts}, [arrived for _, arrived, _ in starts]
            if step == 0:
                assert finished == {passes} and len(set(arrived)) == 1
            else:
                assert finished == {passes - 1} and arrived[0] < 0.7 * arrived[-1]


def after_a_surprise(processes: Processes, kind: str) -> Any:
    """Gradients of two steps that are not like those that taught the order."""
    net = Net()
    sums = GradientSums(net, processes, bucket=WIDTH * WIDTH)
    for step in range(2):
        (x,) = batches(step, 1)
        take(sums, [net.parts(x)[:1]])
    take(sums, [surprise(net, kind, processes.rank)])
    found = gradients(net)
    (x,) = batches(7, 1)
    take(sums, [surprise(net, kind, processes.rank)])  # again, as it is expected now
    return found, gradients(net)


def surprise(net: Net, kind: str, rank: int) -> list[Tensor]:
    (x,) = batches(10 + rank, 1)
    parts = net.parts(x)
    match (kind, rank):
        case ("late", 1):  # contributions to buckets that have left, and to parameters that had none before
            return [*parts, net.unused(net.first(x)).square().mean()]
        case ("fewer", 1):  # what was used is not
            return [net.second(x).square().mean()]
        case ("nothing", 1):
            return [x.sum().requires_grad_() * 1.0]
        case ("other", _):  # each process uses another layer only
            return [(net.first if rank else net.second)(x).square().mean()]
        case ("nan", 1):
            return [math.nan * parts[0]]
    return parts[:1]


KINDS = ("late", "fewer", "nothing", "other", "nan")


def everything(processes: Processes) -> Any:
    return {"steps": whole_steps(processes)} | {kind: after_a_surprise(processes, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two processes found, by rank."""
    return run_in_ranks("test_gradients:everything", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_differs_in_one_process_is_summed_all_the_same(ranks: list[Any], kind: str) -> None:
    wanted = expected(lambda net: [loss for rank in range(2) for loss in surprise(net, kind, rank)])
    for found, again in (rank[kind] for rank in ranks):
        if kind == "nan":
            assert all(found[f"first.{i}.weight"].isnan().all() for i in range(LAYERS))
            continue
        assert_equal(found, wanted)
        assert_equal(again, wanted)


def test_one_process_sums_nothing() -> None:
    net = Net()
    sums = GradientSums(net, Processes("cpu"))
    (x,) = batches(0, 1)
    take(sums, [net.parts(x)])
    assert_equal(gradients(net), expected(lambda net: net.parts(x)))
    assert not sums.flights and not sums.absent
