"""FVD: the Frechet part by closed forms, baselines at the same number of clips, the protocol in the key, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unilatent.evaluation.protocol import Protocol
from unilatent.modalities.base import Evidence, Row
from unilatent.modalities.video.fvd import (
    ClipProtocol,
    FrechetVideoDistance,
    Inflated,
    KernelVideoDistance,
    ReconstructionFVD,
    evenly,
    fvd_metrics,
    halves,
)
from unilatent.modalities.video.motion import halved, shuffled, still
from unilatent.nets.i3d import ClipFeatures
from unilatent.records import MemoryRows, Statistics

PROTOCOL = ClipProtocol(frames=16, size=(128, 128), stride=2, given=5)
CPU = torch.device("cpu")


class MeanLevels(nn.Module):
    """Stands in for I3D: the mean level of every frame, and the size that it was told to score."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(1, 1).requires_grad_(False)
        self.network.weight.fill_(2)
        self.network.bias.fill_(1)

    def forward(self, clips: Tensor, scored: int | None = None) -> ClipFeatures:
        means = clips.float().mean((2, 3, 4))
        return ClipFeatures(torch.cat([means, torch.full((len(clips), 1), float(scored or 0))], dim=1), means)


def space(protocol: ClipProtocol = PROTOCOL) -> Inflated:
    found = Inflated(protocol)
    found.use(MeanLevels(), CPU)  # type: ignore[arg-type]
    return found


def clips(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 16, 3, 8, 8), generator=generator, dtype=torch.uint8)


# ---- the space


def test_clips_are_scored_at_their_size_and_at_64():
    found = space()(clips() / 255)
    assert list(found) == ["logits", "logits_64"]
    assert found["logits"][:, -1].tolist() == [0, 0, 0] and found["logits_64"][:, -1].tolist() == [64, 64, 64]
    torch.testing.assert_close(found["logits"][:, :16], clips().float().mean((2, 3, 4)))
    small = space(replace(PROTOCOL, size=(64, 64)))(clips() / 255)
    assert list(small) == ["logits"]


def test_controls_are_spoiled_clips():
    found = space().controls(clips() / 255)
    made = {"still": still(clips(), 5), "shuffled": shuffled(clips(), 5), "halved": halved(clips())}
    for name, spoiled in made.items():
        torch.testing.assert_close(found[f"{name}_logits"][:, :16], spoiled.float().mean((2, 3, 4)))
        assert f"{name}_logits_64" in found


def test_given_frames_can_be_left_out():
    found = space(replace(PROTOCOL, context="left out"))(clips() / 255)
    torch.testing.assert_close(found["logits"][:, :11], clips()[:, 5:].float().mean((2, 3, 4)))


@pytest.mark.parametrize(
    ("protocol", "frames"),
    [(replace(PROTOCOL, frames=8), 8), (replace(PROTOCOL, given=8, context="left out"), 8)],
)
def test_short_clips_are_refused_before_a_download(protocol: ClipProtocol, frames: int):
    with pytest.raises(ValueError, match=f"at least 9 frames, these have {frames}"):
        Inflated(protocol).prepare(CPU)


# ---- the numbers


def features(mean: float, std: float, count: int = 400, seed: int = 0, width: int = 5) -> Tensor:
    """(count, width) of exactly this mean in all columns, and covariance std^2 times the identity."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / (count - 1))
    return (torch.linalg.solve_triangular(root, x.T, upper=False).T * std + mean).float()


def distance(a: tuple[float, float], b: tuple[float, float], width: int = 5) -> float:
    return width * ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2)


def one(rows: list[Row]) -> Row:
    (row,) = rows
    return row


def test_fvd_and_its_baselines_by_closed_form():
    kinds = {
        "logits": ("held-out real, n = 400", (1.0, 2.0)),
        "still_logits": ("last frame repeated", (3.0, 2.0)),
        "shuffled_logits": ("frames shuffled", (1.0, 5.0)),
        "halved_logits": ("half resolution", (2.0, 3.0)),
    }
    held_out = MemoryRows({name: features(*kind, seed=i) for i, (name, (_, kind)) in enumerate(kinds.items())})
    train, samples = (MemoryRows({"logits": features(*kind, seed=9)}) for kind in ((1.5, 2.5), (4.0, 1.0)))
    row = one(FrechetVideoDistance(PROTOCOL)(Evidence(train=train, held_out=held_out, samples=samples)))
    assert (row.key, row.better) == ("fvd", "lower")
    assert row.value == pytest.approx(distance((1.5, 2.5), (4, 1)), rel=1e-5)
    assert row.beside == pytest.approx({name: distance((1.5, 2.5), kind) for name, kind in kinds.values()}, rel=1e-5)


def test_baselines_have_the_number_of_clips_of_the_samples():
    """With fewer held-out clips, the FVD of as many samples stands beside."""
    real = MemoryRows({"logits": features(0, 1, 1000)})
    many, few = (MemoryRows({"logits": features(0, 1, n, seed=n)}) for n in (300, 100))
    metric = FrechetVideoDistance(PROTOCOL)
    assert list(one(metric(Evidence(train=real, held_out=many, samples=few))).beside) == ["held-out real, n = 100"]
    beside = one(metric(Evidence(train=real, held_out=few, samples=many))).beside
    assert list(beside) == ["held-out real, n = 100", "the first 100 samples"]
    assert beside["held-out real, n = 100"] == pytest.approx(0, abs=1e-3) and beside["the first 100 samples"] > 0.01


def test_without_held_out_clips_two_halves_of_the_real_ones_are_compared():
    values = torch.stack([features(0, 1, 500), features(2, 1, 500, seed=1)], dim=1).flatten(0, 1)  # alternating
    beside = one(
        FrechetVideoDistance(PROTOCOL)(
            Evidence(train=MemoryRows({"logits": values}), samples=MemoryRows({"logits": features(0, 1, 600)}))
        )
    ).beside
    assert list(beside) == ["real halves, n = 500"]
    assert beside["real halves, n = 500"] == pytest.approx(distance((0, 1), (2, 1)), rel=1e-4)
    assert list(halves(values, 30)) == ["real halves, n = 30"]


def test_a_reference_that_is_only_moments():
    train = Statistics({"logits": (torch.full((5,), 1.5).double(), 6.25 * torch.eye(5).double())}, 400)
    samples = MemoryRows({"logits": features(4, 1)})
    row = one(FrechetVideoDistance(PROTOCOL)(Evidence(train=train, samples=samples)))
    assert row.value == pytest.approx(distance((1.5, 2.5), (4, 1)), rel=1e-5) and row.beside == {}
    assert KernelVideoDistance(PROTOCOL)(Evidence(train=train, samples=samples)) == []


def test_rfvd_by_closed_form():
    real = MemoryRows({"logits_64": features(0, 1), "halved_logits_64": features(0, 3)})
    made = MemoryRows({"logits_64": features(1, 1)})
    row = one(ReconstructionFVD(PROTOCOL, 64)(Evidence(held_out=real, reconstructions=made)))
    assert (row.key, row.value) == ("rfvd_64", pytest.approx(5, rel=1e-5))
    assert row.beside == pytest.approx({"half resolution": distance((0, 1), (0, 3))}, rel=1e-5)


def test_reconstructions_are_given_nothing():
    """What samples are given is no part of rFVD's protocol, and a clip that keeps it is no baseline."""
    real = MemoryRows({f"{name}logits": features(0, 1) for name in ("", "still_", "shuffled_", "halved_")})
    made = MemoryRows({"logits": features(1, 1)})
    row = one(ReconstructionFVD(PROTOCOL)(Evidence(held_out=real, reconstructions=made)))
    assert list(row.beside) == ["half resolution"]
    whole = replace(PROTOCOL, given=0)
    row = one(ReconstructionFVD(whole)(Evidence(held_out=real, reconstructions=made)))
    assert list(row.beside) == ["last frame repeated", "frames shuffled", "half resolution"]
    for protocol in (PROTOCOL, replace(PROTOCOL, context="decoded"), whole):
        merged = {**protocol.details(), **ReconstructionFVD(protocol).details}
        assert merged == {**whole.details(), **ReconstructionFVD(whole).details}
    left_out = replace(PROTOCOL, context="left out")  # then fewer frames are scored
    merged = {**left_out.details(), **ReconstructionFVD(left_out).details}
    assert merged["given"] == "given5-left out" and FrechetVideoDistance(PROTOCOL).details.get("given") is None


def test_kvd_does_not_depend_on_the_number_of_clips_and_fvd_does():
    """Two sets of one distribution: KVD is 0 within three standard errors; FVD is far above 0 and falls with n."""
    found = {}
    for n in (30, 300):
        real, made = (torch.randn(n, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
        evidence = Evidence(train=MemoryRows({"logits": real}), samples=MemoryRows({"logits": made}))
        kvd = one(KernelVideoDistance(PROTOCOL)(evidence))
        assert kvd.spread is not None and abs(kvd.value) < 3 * kvd.spread
        found[n] = one(FrechetVideoDistance(PROTOCOL)(evidence)).value
    assert found[30] > 5 * found[300] > 1


def test_evenly():
    assert evenly(torch.arange(10), 5).tolist() == [0, 2, 4, 6, 8]
    assert evenly(torch.arange(3), 3).tolist() == [0, 1, 2]


# ---- the protocol


def protocol_of(metric: FrechetVideoDistance, **changes: object) -> Protocol:
    fields = {
        "track": "generation", "num_samples": 2048, "reference": "training data", "reference_data": "0",
        "num_reference": 2048, "preprocessing": "centre crop", "resolution": (16, 128, 128, 3), "space": "i3d",
        "details": {"clips": "1-a-video", **space().details, **metric.details}, **changes,
    }  # fmt: skip
    return Protocol.parse(fields)


def test_the_key_has_the_whole_protocol():
    metric = FrechetVideoDistance(PROTOCOL, 64)
    weights = space().weights
    assert weights is not None
    assert protocol_of(metric).key("fvd_64") == (
        f"fvd_64-2048/centre/1-a-video/16f-stride2/given5-real/resize-tf1/i3d-{weights[:8]}/128x128-scored-64x64/"
        "made-elsewhere"
    )
    assert FrechetVideoDistance(PROTOCOL).details == {"size": "128x128"}


@pytest.mark.parametrize(
    "change", [{"frames": 17}, {"stride": 1}, {"given": 4}, {"context": "decoded"}, {"resize": "torch"}],
)  # fmt: skip
def test_every_choice_changes_the_protocol(change: dict):
    assert replace(PROTOCOL, **change).details() != PROTOCOL.details()


def test_few_clips_always_come_with_a_warning():
    metric = FrechetVideoDistance(PROTOCOL)
    assert {"n = 2,048", "reference n = 2,048"} <= set(protocol_of(metric).cautions())
    many = protocol_of(metric, num_samples=50_000, num_reference=29_000)
    assert not any(caution.startswith(("n =", "reference n =")) for caution in many.cautions())


def test_all_metrics():
    keys = [key for metric in fvd_metrics(PROTOCOL) for key in metric.gives]
    assert keys == ["rfvd", "rfvd_64", "fvd", "fvd_64", "kvd"]
    small = fvd_metrics(replace(PROTOCOL, size=(64, 64)))
    assert [key for metric in small for key in metric.gives] == ["rfvd", "fvd", "kvd"]
    assert all(metric.needs_held_out and metric.space == "i3d" for metric in small)
