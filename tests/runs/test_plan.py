"""`unilatent plan`: counts against closed forms and against steps that are taken, and what is printed."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import Command
from test_memory import example_of
from torch.utils.flop_counter import FlopCounterMode

import unilatent
from unilatent.config import ConfigError
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.modalities._media import losses
from unilatent.nets import branches, gpu_formulas
from unilatent.nets.lpips import STAGES
from unilatent.presets import preset, presets
from unilatent.training.flop import StepCounter
from unilatent.training.memory import estimate
from unilatent.training.optimizer import Optimizers
from unilatent.training.plan import BETWEEN, GPUS, WITHIN, Machines, RunPlan, on_gpu, plan, stages_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from stored_latents import flop

PAGE = Path(unilatent.__file__).parents[2] / "docs" / "presets.md"
ONE = Machines(gpus=1)


@cache
def planned(name: str, *overrides: str, machines: Machines = ONE, samples: int | None = None) -> RunPlan:
    return plan(preset(name).override(*overrides), machines, samples)


# ---- counts ----------------------------------------------------------------------------------------------------------


def test_flop_are_those_of_a_step_that_is_taken() -> None:
    """The shapes of fake tensors against a real forward and backward pass, with the same formulas."""
    config = on_gpu(preset("digits"))
    model, batch = LatentModel.build(config.model()), example_of(config)[1]
    with StepCounter() as counter, gpu_formulas.gpu_formulas():
        branches.on_cpu = lambda x: x.device.type == "cpu"  # values: the norms of a CPU; products are the same
        for part in model.loss(batch, Streams(("flop",), range(2))):
            part.value.backward()
            part.close()
    assert planned("digits").flop_per_sample == pytest.approx(counter.flop / 2, rel=1e-9)


def test_flop_are_those_of_torch_s_counter() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    with FlopCounterMode(display=False) as known:
        network(torch.ones(2, 3, 8, 8)).sum().backward()
    with StepCounter() as counter:
        network(torch.ones(2, 3, 8, 8)).sum().backward()
    assert counter.flop == known.get_total_flops() > 0 and counter.launches > 5


def test_attention_on_a_cpu_counts_as_on_a_gpu() -> None:
    """Two products of 2 b h n^2 d forward; five backward, of which one is computed again."""
    q, k, v = (torch.randn(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    with StepCounter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    product = 2 * 2 * 3 * 8 * 8 * 4
    assert counter.flop == (2 + 5) * product


def test_memory_is_that_of_the_dry_run_in_float32() -> None:
    """Weights, gradients, optimizer and EMA to the byte; activations differ by the formulas of a GPU."""
    needed = planned("digits").memory
    known = estimate(*example_of(preset("digits")), torch.device("cpu"))
    for part in ("weights", "gradients", "optimizer", "average"):
        assert getattr(needed, part) == getattr(known, part), part
    assert needed.activations == pytest.approx(known.activations, rel=0.3)


def test_counts_leave_the_formulas_of_the_machine() -> None:
    before = branches.on_cpu, torch.nn.functional.rms_norm
    planned("digits")
    assert (branches.on_cpu, torch.nn.functional.rms_norm) == before and not gpu_formulas.counting()


def test_recomputation_is_counted_and_saves_memory() -> None:
    plain = planned("digits")
    again = planned("digits", "training.activation_checkpointing=true")
    assert plain.flop_recomputed == 0 < again.flop_recomputed
    assert again.flop_per_sample - again.flop_recomputed == pytest.approx(plain.flop_per_sample, rel=1e-9)
    assert again.memory.activations < plain.memory.activations


def test_draws_cost_flop_and_chunks_bound_memory() -> None:
    """Each draw costs as much as another; a chunk of two holds about what two draws hold."""
    one, two, six = (planned("digits", f"method.flow_draws={n}") for n in (1, 2, 6))
    assert six.flop_per_sample - two.flop_per_sample == pytest.approx(4 * (two.flop_per_sample - one.flop_per_sample))
    chunked = planned("digits", "method.flow_draws=6", "method.flow_chunk=2")
    assert chunked.flop_per_sample == pytest.approx(six.flop_per_sample, rel=1e-9)
    assert chunked.memory.activations == pytest.approx(two.memory.activations, rel=0.1)
    assert chunked.memory.activations < 0.6 * six.memory.activations


def test_bytes_sent_are_those_of_rings() -> None:
    """An all-reduce sends 2 (W - 1) / W of its size, a gather (W - 1) / W: gradients in float32, Muon in bfloat16."""
    found = planned("digits", machines=Machines(gpus=4))
    model = LatentModel.build(on_gpu(preset("digits")).model())
    (_, muon) = Optimizers(model, on_gpu(preset("digits")).training.optimizer).all
    matrices = sum(p.numel() for p in muon.param_groups[0]["params"])
    assert found.sent == pytest.approx(
        {"sums of gradients": 2 * 3 / 4 * 4 * model.num_trainable, "updates of Muon": 3 / 4 * 2 * matrices}
    )
    assert planned("digits").sent == {}


def blocks_of(model: LatentModel) -> dict[str, int]:
    """Network -> numbers in its repeated blocks."""
    networks = {"encoder": model.generative_encoder, "decoder": model.decoder}
    return {name: sum(p.numel() for p in one.transformer.blocks.parameters()) for name, one in networks.items()}


def test_sharding_gathers_weights_sums_gradients_once_a_step_and_holds_less() -> None:
    """Three draws at a time: encoder blocks are called twice in a micro-batch, decoder blocks once. They are gathered
    in the precision of the run, and summed once in float32, however many micro-batches there are."""
    four = Machines(gpus=4)
    whole, sharded, exact, parts = (
        planned("digits", *settings, machines=four)
        for settings in (
            ["training.shard=false"], ["training.shard=true", "training.precision=bf16"], ["training.shard=true"],
            ["training.shard=true", "training.precision=bf16", "training.micro_batch_size=4"],
        )
    )  # fmt: skip
    model = LatentModel.build(on_gpu(preset("digits")).model())
    size = blocks_of(model)
    gathered = 2 * 3 / 4 * 2 * (2 * size["encoder"] + size["decoder"])
    assert sharded.sent["gathers of sharded weights"] == pytest.approx(gathered)
    assert exact.sent["gathers of sharded weights"] == pytest.approx(2 * gathered)
    assert parts.micro_batches > 1 == sharded.micro_batches
    assert parts.sent["gathers of sharded weights"] == pytest.approx(parts.micro_batches * gathered)
    blocks = sum(size.values())
    sums = 3 / 4 * 4 * (2 * (model.num_trainable - blocks) + blocks)
    assert sharded.sent["sums of gradients"] == pytest.approx(sums) == parts.sent["sums of gradients"]
    assert sharded.memory.optimizer < whole.memory.optimizer


def test_what_all_cards_of_a_machine_send_to_others_shares_its_network() -> None:
    """Four machines of two cards. Round a ring, one card of a machine sends outside; sums of shards, and Muon's
    exchange of sharded matrices, go from both at once."""
    eight = Machines(gpus=8, gpus_per_node=2, network=1e6)
    hybrid, whole = (
        planned("digits", f"training.shard={mode}", "training.precision=bf16", machines=eight)
        for mode in ("hybrid", "true")
    )
    model = LatentModel.build(on_gpu(preset("digits")).model())
    size, blocks = blocks_of(model), sum(blocks_of(model).values())
    (_, muon) = Optimizers(model, on_gpu(preset("digits")).training.optimizer).all
    sharded = {id(p) for one in (model.generative_encoder, model.decoder) for p in one.transformer.blocks.parameters()}
    matrices = sum(p.numel() for p in muon.param_groups[0]["params"] if id(p) in sharded)
    rows = 2 * matrices / 8  # in bfloat16, of the matrices of one owner
    gathered = 2 * 1 / 2 * 2 * (2 * size["encoder"] + size["decoder"])
    assert hybrid.sent[WITHIN] == pytest.approx(gathered + 1 / 2 * 4 * blocks + 2 * rows / 2), "an owner's, and back"
    assert hybrid.sent[BETWEEN] == pytest.approx(2 * 3 / 4 * 4 * blocks / 2 + 6 * rows / 2), "results to three copies"
    assert whole.sent[WITHIN] == pytest.approx(2 * rows / 8) and whole.sent[BETWEEN] == pytest.approx(2 * 6 * rows / 8)
    assert "gathers of sharded weights" not in hybrid.sent
    for found in (hybrid, whole):
        ring = sum(bytes for purpose, bytes in found.sent.items() if purpose not in (WITHIN, BETWEEN))
        seconds = ring / 1e6 + found.sent[BETWEEN] / (1e6 / 2) + found.sent[WITHIN] / eight.gpu.link
        assert found.seconds["communication"] == pytest.approx(seconds)
    assert whole.memory.optimizer < hybrid.memory.optimizer < planned("digits", machines=eight).memory.optimizer


def test_muon_s_products_are_shared() -> None:
    """Five iterations of 2 (2 m^2 n + m^3) FLOP for a matrix of m rows and n > m columns; the sum over all
    processes is at least that of one."""
    weight = torch.nn.Linear(48, 16, bias=False)
    weight.uses_muon = True
    optimizers = Optimizers(weight, preset("digits").training.optimizer)
    assert optimizers.flop(1) == 5 * 2 * (2 * 16**2 * 48 + 16**3) == optimizers.flop(3)
    one, four = planned("digits").flop_update, planned("digits", machines=Machines(gpus=4)).flop_update
    assert one / 4 <= four < one


@pytest.mark.parametrize("name", ["digits-ul", "molecules", "joint", "scenes-unite"])
def test_every_kind_of_run_can_be_planned(name: str) -> None:
    """Both stages, sets of atoms and texts, without data and without downloads."""
    for stage in stages_of(preset(name)):
        found = plan(stage, ONE)
        assert found.flop_per_sample > 0 and found.memory.fits and found.num_steps == stage.training.steps


def test_lpips_is_counted_without_its_weights() -> None:
    """Twice the same, with nothing left behind that real images could meet; its FLOP are those of VGG16."""
    losses.lpips_without_values.cache_clear()
    before, config = dict(losses.LOADED), preset("scenes-unite")
    found = [plan(config.override("modality.perceptual_weight=1"), ONE) for _ in range(2)]
    assert found[0] == found[1] and before == losses.LOADED
    sizes, channels, forward = 32, 3, 0
    for stage in STAGES:
        for width in stage:
            forward += 2 * sizes**2 * 9 * channels * width
            channels = width
        sizes //= 2
    first = 2 * 32**2 * 9 * 3 * 64  # the gradient by the weights is never needed, that by the target neither
    extra = found[0].flop_per_sample - plan(config, ONE).flop_per_sample
    assert extra == pytest.approx(3 * forward, abs=2 * first), "two images forward, one backward"


@pytest.mark.parametrize("name", ["digits-ul", "scenes-ul"])
def test_stored_latents_leave_out_what_encodes(name: str) -> None:
    """FLOP are those of `benchmarks/stored_latents.py`, of both kinds of steps; memory is that of a run's own estimate
    with a batch of latents. The frozen tokenizer stays in memory, as in a run."""
    config = preset(name)
    encoding, stored = flop(config)
    without, found = (plan(config.override(f"training.latents={place}"), ONE) for place in ("null", "z"))
    assert without.flop_per_sample == pytest.approx(encoding, rel=1e-9) and without.latents is None
    assert found.flop_per_sample == pytest.approx(stored, rel=1e-9) and found.latents == "z"
    assert stored < encoding and found.launches < without.launches
    for part in ("weights", "gradients", "optimizer", "average"):
        assert getattr(found.memory, part) == getattr(without.memory, part), part
    assert found.memory.activations < without.memory.activations


def test_a_plan_with_stored_latents_says_what_it_assumes(cli: Command) -> None:
    """Of both stages, of which the second reads them; the folder need not be there."""
    done = cli("plan", "digits-ul", "--gpus", "1", "training.latents=somewhere/z")
    words = " ".join(done.out.split())
    assert done.code == 0 and words.count("latents stored in somewhere/z; no step encodes") == 1, done
    assert "the folder was not looked at. Left out: `unilatent encode --views`" in words
    assert "The frozen tokenizer counts as weights" in words and max(map(len, done.out.splitlines())) <= 80
    first, second = json.loads(cli("plan", "digits-ul", "--json", "training.latents=z").out)["stages"]
    assert (first["latents"], second["latents"]) == (None, "z")
    assert "stored" not in cli("plan", "digits-ul", "--gpus", "1").out


# ---- what follows from counts ----------------------------------------------------------------------------------------


def test_times_are_counts_divided_by_rates() -> None:
    found = replace(planned("digits", samples=640), flop_per_sample=1e12, launches=1, precision="bf16")
    gpu = GPUS["h100"]
    assert found.seconds["forward and backward pass"] == pytest.approx(64e12 / (0.3 * gpu.bf16))
    assert found.bound == "matrix products" and found.steps_per_epoch == 10
    half = replace(found, machines=replace(ONE, share=0.15))
    assert half.products == pytest.approx(2 * found.products)
    assert replace(found, precision="fp32").products > found.products
    assert found.plain()["gpu_hours"] == pytest.approx(800 * found.step_seconds / 3600)


def test_what_bounds_a_step() -> None:
    assert planned("digits").bound == "launches of kernels"
    found = replace(planned("digits"), flop_per_sample=0.0, launches=0, sent={"sums": 1e9})
    assert found.bound == "communication"
    assert replace(found, sent={}).bound == "update of the weights"


def test_length_in_epochs_needs_the_number_of_samples() -> None:
    settings = ("training.epochs=3",)
    assert planned("digits", *settings).num_steps is None
    assert planned("digits", *settings, samples=640).num_steps == 30


def test_networks_between_machines_are_slower() -> None:
    near, far = Machines(gpus=8), Machines(gpus=16)
    assert (near.nodes, far.nodes) == (1, 2) and near.rate == GPUS["h100"].link and far.rate == 50e9
    assert Machines("l40s", 16, network=100e9).rate == GPUS["l40s"].link


def test_what_does_not_fit_comes_with_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(GPUS["a100"], memory=20 * 2**20)
    monkeypatch.setitem(GPUS, "a100", small)
    found = plan(preset("digits"), Machines("a100", 1))
    largest = found.memory.fitting
    assert not found.memory.fits and largest
    for size, fits in ((largest, True), (2 * largest, False)):
        again = plan(preset("digits").override(f"training.micro_batch_size={size}"), Machines("a100", 1))
        assert again.memory.fits is fits


# ---- the command -----------------------------------------------------------------------------------------------------


def test_plan_prints_readable_lines(cli: Command) -> None:
    done = cli("plan", "digits", "--gpus", "2", "--gpu", "a100")
    assert done.code == 0 and max(map(len, done.out.splitlines())) <= 80, done
    for words in ("weights", "gradients", "optimizer", "EMA", "activations", "FLOP a step", "sums of gradients",
                  "GPU hours", "bound by", "assumed", "30 % of 312 TFLOP/s"):  # fmt: skip
        assert words in done.out, words
    assert "an epoch of 1,437 samples" in done.out


def test_plan_as_json(cli: Command) -> None:
    done = cli("plan", "digits", "data.held_out=100", "--gpus", "1", "--json")
    (stage,) = json.loads(done.out)["stages"]
    assert stage["steps"] == 800 and stage["samples"] is None, "other data than the preset's"
    assert stage["memory"]["fits"] and stage["assumed"]["share_of_peak"] == 0.3
    assert (
        sum(stage["memory"][part] for part in ("weights", "gradients", "optimizer", "average", "activations"))
        == (stage["memory"]["total"])
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpu", "h10"), "--gpu: 'h10' is unknown; did you mean 'h100'? use one of a100"),
        (("--gpu", "H100-SXM"), "did you mean 'h100'? use one of a100"),
        (("--gpu", "a6000"), "--gpu: 'a6000' is unknown; use one of a100"),
        (("--share", "2"), "--share: 2 is no share of the peak"),
        (("--network", "0"), "--network: 0 cannot be used; give a number above 0"),
        (("--gpus", "65"), "training.batch_size: 64 is less than the 65"),
        (("training.step=3",), "did you mean 'steps'"),
        (("training.latents=z",), "training.latents: set, but unite trains its own encoder"),
    ],
)
def test_wrong_plans_are_refused_in_one_line(cli: Command, options: tuple[str, ...], words: str) -> None:
    refused = cli("plan", "digits", *options)
    assert refused.code == 2 and words in refused.err and len(refused.err.splitlines()) == 1, refused


def test_a_machine_needs_cards() -> None:
    with pytest.raises(ConfigError, match="--gpus: 0 cannot be used"):
        Machines(gpus=0)


# ---- the presets -----------------------------------------------------------------------------------------------------


def documented() -> dict[str, list[str]]:
    """Rows of the table of presets that fit: title -> cells."""
    table = PAGE.read_text().partition("<!-- plan -->")[2].partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if "`" in line]
    return {row[0]: row[1:] for row in rows}


def large() -> list[str]:
    return [name for name, entry in presets().items() if entry.gpus]


def test_every_large_preset_is_in_the_table() -> None:
    titles = documented()
    for name in large():
        stages = stages_of(preset(name))
        wanted = [f"`{name}`"] if len(stages) == 1 else [f"`{name}`, stage {i}" for i in (1, 2)]
        assert set(wanted) <= titles.keys(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", large())
def test_every_large_preset_fits_80_gb_as_documented(name: str) -> None:
    """The table's memory and FLOP are those that `plan` counts, and fit a card of 80 GB."""
    machines, rows = Machines("a100", presets()[name].gpus), documented()
    for number, stage in enumerate(stages_of(preset(name)), 1):
        title = f"`{name}`" if preset(name).first is None else f"`{name}`, stage {number}"
        found = plan(stage, machines, presets()[name].samples)
        assert found.memory.fits, found.memory.warning()
        cells = rows[title]
        assert float(re.findall(r"[\d.]+", cells[3])[0]) == pytest.approx(found.memory.total / 2**30, abs=0.06)
        assert float(re.findall(r"[\d.]+", cells[4])[0]) == pytest.approx(found.flop_per_sample / 1e12, abs=6e-4)
