"""The decoder, sharpened by an adversary (UNITE, App. A): everything else frozen, so that latents stay bit for bit.

The discriminator D starts from the model's own encoder, with one logit a latent; no other network takes part. With x
the data tokens, x_hat the decoder's, and l the last weight of the decoder:

    L_D = mean max(0, 1 - D(x)) / 2 + mean max(0, 1 + D(x_hat)) / 2  [+ r1_weight / 2 R]                      hinge
    L   = L_rec - a adversarial_weight mean D(x_hat),  a = |dL_rec/dl| / |d mean D(x_hat)/dl|        (Esser et al. 2021)

R = mean ((D(x + s eps) - D(x)) / s)^2 with s = 0.01, whose expectation over eps is |dD/dx|^2 for small s: the R1
penalty without differentiating twice, which fast attention cannot (Lin et al. 2025, arXiv 2501.08316).

It has its own loop, because two networks with two optimizers are trained in turn; the promises are those of a run:
checkpoints with a manifest, a lock, bitwise resuming, SIGTERM saves.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from ..batches import Plan, loader, shown_batch, shown_size, worker_deaths
from ..config import Config, ConfigError
from ..devices import autocast, peak_memory, pick_device, resolve_precision, set_float32_products
from ..files import read_json, write_json, write_text
from ..loading import load
from ..maths.streams import Streams
from ..methods.base import Sharpening
from ..modalities.base import Splits
from ..model_card import SHARPENED, ModelRecord
from ..plain_text import count_of
from ..processes import Processes
from ..runs import checkpoint as ckpt
from ..runs import lock
from ..runs.crash import write_report
from ..runs.journal import Journal, trim
from ..runs.listing import FINETUNED
from ..sampling import reconstruct
from ..signals import SAVE, STOP, StopRequest
from ..terminal import lasting_output
from ..types import Batch, Layout, Tokens
from .config import OptimizerConfig
from .ema import EMA
from .optimizer import Optimizers
from .restoring import restore
from .setup import environment
from .state import refuse_non_finite

DRAWN = 10
"""Held-out samples that are drawn."""
GUESSING = 0.995
"""Hinge loss of a discriminator that knows next to nothing."""
UNDECIDED = (
    "the discriminator cannot tell real from made (its loss is 1 for a guess), so the decoder learns nothing from it; "
    "give it more steps alone (start), or a lower discriminator_learning_rate"
)
SIGMA = 0.01
"""Standard deviation of the noise of the penalty R."""


class DecoderGANConfig(Config):
    """steps, batch_size, seed: of the fine-tuning; its own.
    learning_rate, discriminator_learning_rate: of both optimizers.
    muon: Muon for the matrices, as in training; false: AdamW for all parameters. AdamW has betas (0.5, 0.9).
    adversarial_weight: of the adversarial term, relative to the reconstruction loss by the adaptive factor a.
    start: steps in which only the discriminator learns: until it tells real from made, its gradients mean nothing.
    r1_weight, r1_every: of the penalty R on real data, every so many steps; 0: none.
    ema_decay: of the decoder's average, which is what is saved in the end.
    """

    steps: int = Field(default=4000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    seed: int = Field(default=0, ge=0)
    learning_rate: float = Field(default=2e-4, gt=0)
    discriminator_learning_rate: float = Field(default=1e-3, gt=0)
    muon: bool = True
    adversarial_weight: float = Field(default=0.5, ge=0)
    start: int = Field(default=200, ge=0)
    r1_weight: float = Field(default=0.0, ge=0)
    r1_every: int = Field(default=16, ge=1)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)
    device: str | None = None
    log_every: int = Field(default=20, ge=1)
    sample_every: int = Field(default=500, ge=0)
    checkpoint_every: int = Field(default=200, ge=1)
    keep_checkpoints: int = Field(default=3, ge=2)


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """The discriminator's loss of logits of real and made data."""
    return (torch.relu(1 - real).mean() + torch.relu(1 + made).mean()) / 2


def adaptive_weight(made: Tensor, reconstruction: Tensor, adversarial: Tensor, last: nn.Parameter) -> Tensor:
    """Return |d reconstruction / d last| / |d adversarial / d last|, at most 10,000, without a gradient.

    made: what both losses are of. reconstruction, adversarial: their gradients by it.
    """
    slopes = (reconstruction, adversarial)
    norms = [torch.autograd.grad(made, last, slope, retain_graph=True)[0].norm() for slope in slopes]
    return (norms[0] / (norms[1] + 1e-8)).clamp(0, 1e4).detach()


class DecoderGAN:
    """One fine-tuning: the model of a finished run, its data, the discriminator, two optimizers and a folder."""

    def __init__(
        self, source: Path, out: Path, config: DecoderGANConfig, splits: Splits, run: str | None,
        console: Console | None = None,
    ):  # fmt: skip
        """source: a run or model folder. splits: its data. run: its config.yaml, copied to `out` so that `out` is a
        run to evaluate. ConfigError if the method has no decoder that can be sharpened, or `out` holds another one."""
        self.source, self.out, self.config, self.splits = source, out, config, splits
        self.run, self.console = run, console or Console(stderr=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("finetune-decoder: runs in one process; start it without torchrun")
        try:
            device = pick_device(config.device)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._refuse_other_files()
        self.processes = Processes.alone(device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.model = load(source, device=device)
        self.precision = resolve_precision(config.precision, device, self.model.precision)
        parts = self.model.sharpening()
        if parts is None or not self.model.modality.tokens_are_data:
            names = self.model.config
            raise ConfigError(
                f"{source}: this decoder cannot be sharpened: that needs a method that decodes in one pass, and data "
                f"that are tokens, such as pixels; this is {names.method.name} on {names.modality.name}"
            )
        self.parts: Sharpening = parts
        self.model.requires_grad_(False)
        self.parts.decoder.requires_grad_(True)
        self.model.modality.prepare(device)
        self.fingerprint = self.model.fingerprint()
        rates = {"decoder": config.learning_rate, "discriminator": config.discriminator_learning_rate}
        self.optimizers = {
            name: Optimizers(
                network, OptimizerConfig(learning_rate=rates[name], muon=config.muon, betas=(0.5, 0.9), eps=1e-8)
            )
            for name, network in (("decoder", self.parts.decoder), ("discriminator", self.parts.discriminator))
        }  # fmt: skip
        self.ema = EMA(self.parts.decoder, config.ema_decay)
        self.step = 0
        self.changes: list[dict[str, Any]] = []
        self.stop = StopRequest()
        ckpt.restore(out / "checkpoints")
        newest, skipped = ckpt.newest(out / "checkpoints")
        if newest is None and skipped:
            raise ConfigError(f"--out {out}: no valid checkpoint is left ({skipped[0]}); choose another folder")
        self.skipped_checkpoints = skipped
        if newest is not None:
            self._load(newest)

    def _refuse_other_files(self) -> None:
        """ConfigError if `out` holds something else than a fine-tuning, or another process is at work there."""
        out, source = self.out.resolve(), self.source.resolve()
        theirs = [name for name in ("config.yaml", "model", "metrics.jsonl", "checkpoints") if (out / name).exists()]
        if out == source or out in source.parents or (theirs and not (out / FINETUNED).is_file()):
            raise ConfigError(f"--out {self.out}: holds a run or model; choose a folder of its own")
        lock.refuse_second(self.out)

    # ---- state

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File of a checkpoint -> its tensors."""
        return {
            "decoder": self.parts.decoder.state_dict(), "ema": self.ema.weights,
            "discriminator": self.parts.discriminator.state_dict(),
            **{f"{name}_optimizer": optimizers.state() for name, optimizers in self.optimizers.items()},
        }  # fmt: skip

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        files = {name: {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
                 for name, tensors in self.tensors().items()}  # fmt: skip
        refuse_non_finite(files, self.step, self.processes)

        def write(folder: Path) -> None:
            for name, tensors in files.items():
                save_file(tensors, folder / f"{name}.safetensors")
            settings = {**self.config.plain(), "precision": self.precision}
            facts = {"step": self.step, "source": self.fingerprint, "settings": settings, "changes": self.changes}
            write_json(folder / "state.json", facts)

        needed = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        ckpt.save(self.out / "checkpoints", self.step, write, self.config.keep_checkpoints, needed)

    def _load(self, checkpoint: Path) -> None:
        facts = read_json(checkpoint / "state.json", "use an older checkpoint")
        if facts["source"] != self.fingerprint:
            raise ConfigError(
                f"--out {self.out}: its checkpoints are of another model than {self.source}; choose another folder"
            )
        asked = {**self.config.plain(), "precision": self.precision}
        if self.config.precision == "auto":
            self.precision = asked["precision"] = facts["settings"]["precision"]  # on whatever hardware it goes on
        changed = [key for key, value in asked.items() if facts["settings"].get(key) != value and key not in FREE]
        if changed:
            raise ConfigError(
                f"{changed[0]}: {getattr(self.config, changed[0])}, but {checkpoint} was trained with "
                f"{facts['settings'].get(changed[0])}; set that, or choose another folder"
            )
        before, self.changes = facts["settings"], list(facts.get("changes", []))
        rates = {key: (before[key], asked[key]) for key in LEARNING if before.get(key, asked[key]) != asked[key]}
        if facts["step"] >= self.config.steps:  # no step is taken with them
            self.config = self.config.model_copy(update={key: old for key, (old, _) in rates.items()})
        else:
            self.changes += [
                {"step": int(facts["step"]), "setting": key, "from": old, "to": new}
                for key, (old, new) in rates.items()
            ]
        own = {"decoder": self.parts.decoder.state_dict(), "ema": self.ema.weights,
               "discriminator": self.parts.discriminator.state_dict()}  # fmt: skip
        for name, tensors in own.items():
            restore(checkpoint / f"{name}.safetensors", partial(_same, tensors), self.processes)
        for name, optimizers in self.optimizers.items():
            path = checkpoint / f"{name}_optimizer.safetensors"
            restore(path, partial(optimizers.allocate, source=path), self.processes)
        self.step = int(facts["step"])

    # ---- the recipe

    def fit(self) -> Path:
        """Train to the end and return the folder of the sharpened model; a stopped one can be resumed."""
        set_float32_products(self.processes.device, self.precision)
        self._open()
        try:
            with (
                lasting_output(), worker_deaths(), self.stop,
                Journal(self.out, self.config.steps, self.step, self.console) as journal,
            ):  # fmt: skip
                self._announce(journal)
                for numbers, speed in self._train(journal):
                    journal.advance(self.step)
                    if numbers is not None:
                        peak = peak_memory(self.processes.device)
                        memory = {} if peak is None else {"memory_gib": peak / 2**30}
                        journal.log(self.step, {**numbers, "samples_per_second": speed, **memory})
                    if self.config.sample_every and self.step % self.config.sample_every == 0:
                        self._draw()
                self.save()
                if self.step < self.config.steps:
                    journal.say(f"stopped: saved step {self.step}; the same command goes on")
                    return self.out
                with self.ema.applied(self.parts.decoder):
                    self.model.eval()
                    self.model.known = partial(self._record, self.model.known)
                    self.model.save_pretrained(self.out / "model")
                    if self.run is not None:  # now it is a run that others can read
                        write_text(self.out / "config.yaml", self.run)
                    self._draw()
                journal.say(f"finished: {self.out / 'model'}")
                return self.out / "model"
        except Exception as error:
            environment_now = environment(self.processes.device, 1, self.precision)
            report = write_report(self.out, 0, error, self.config.to_yaml(), environment_now)
            self.console.print(f"crash report: {report}", highlight=False, markup=False, soft_wrap=True)
            raise
        finally:
            lock.release(self.out)

    def _train(self, journal: Journal) -> Iterator[tuple[dict[str, float] | None, float]]:
        """Take steps until the end or a stop request; yields the numbers of logged steps, or None."""
        c = self.config
        positions = Plan(range(self.step, c.steps), c.batch_size, None, 0, 1)
        batches = loader(
            self.splits.train, self.model.modality, positions, c.seed, c.workers,
            pin_memory=self.processes.device.type == "cuda", timeout=600,
        )  # fmt: skip
        since, done = time.perf_counter(), 0
        with contextlib.closing(batches):
            for rows, (batch, skipped) in zip(positions, batches, strict=False):
                for sample in skipped:
                    journal.warn("samples", f"left out: {sample.message}")
                losses = self.take_step(batch.to(self.processes.device), rows)
                self.step += 1
                done += len(rows)
                numbers = dict(
                    zip(losses, torch.stack([value.double() for value in losses.values()]).tolist(), strict=True)
                )
                if bad := [key for key, value in numbers.items() if not math.isfinite(value)]:
                    raise FloatingPointError(
                        f"step {self.step}: {bad[0]} is not finite; the same command with a lower learning_rate or "
                        "discriminator_learning_rate goes on from the last checkpoint"
                    )
                guesses = self.step > c.start and numbers["loss/discriminator"] > GUESSING
                if guesses and self.step % c.log_every == 0:
                    journal.warn("discriminator", UNDECIDED)
                if self.step % c.log_every == 0 or self.step == c.steps:
                    yield numbers, done / (time.perf_counter() - since)
                    since, done = time.perf_counter(), 0
                else:
                    yield None, 0.0
                request = self.stop.take()
                if request == STOP:
                    return
                if request == SAVE or (self.step % c.checkpoint_every == 0 and self.step < c.steps):
                    self.save()

    def take_step(self, batch: Batch, rows: range) -> dict[str, Tensor]:
        """One step of the discriminator, then, after `start` of them, one of the decoder. rows: the samples' positions,
        which their noise depends on. Returns what it measured, as tensors on the device."""
        c, model, parts = self.config, self.model, self.parts
        model.train()
        parts.discriminator.train()
        streams = Streams(("sharpen", c.seed, self.step), rows, self.processes.device)
        data = model.modality.augment(batch.data, streams)
        tokens = model.modality.pack(data)
        real = tokens.values
        with autocast(model.device, self.precision):
            made = parts.predict(data, streams)  # (B, N, C), with a gradient for the decoder
        layout = tokens.layout
        numbers = self._discriminator_step(real, made.detach(), layout, streams)
        if self.step < c.start:
            return numbers
        parts.discriminator.requires_grad_(False)
        with autocast(model.device, self.precision):
            logits = parts.discriminator(made, layout).float()
            terms = model.modality.reconstruction_loss(Tokens(made, layout), data)
        reconstruction = torch.stack(list(terms.values())).sum()
        adversarial = -logits.mean()
        slopes = [torch.autograd.grad(loss, made)[0] for loss in (reconstruction, adversarial)]
        factor = adaptive_weight(made, slopes[0], slopes[1], parts.last)
        self.optimizers["decoder"].zero_grad()
        made.backward(slopes[0] + c.adversarial_weight * factor * slopes[1])
        self.optimizers["decoder"].step()
        parts.discriminator.requires_grad_(True)
        self.ema.update(parts.decoder)
        return {
            "loss/reconstruction": reconstruction.detach(), "loss/adversarial": adversarial.detach(),
            "adaptive_weight": factor, **{f"loss/{key}": value.detach() for key, value in terms.items()}, **numbers,
        }  # fmt: skip

    def _discriminator_step(
        self, real: Tensor, made: Tensor, layout: Layout, streams: Streams
    ) -> dict[str, Tensor]:  # fmt: skip
        c, network = self.config, self.parts.discriminator
        penalised = c.r1_weight > 0 and self.step % c.r1_every == 0
        with autocast(self.model.device, "fp32" if penalised else self.precision):
            of_real, of_made = network(real, layout).float(), network(made, layout).float()
            loss = hinge(of_real, of_made)
            numbers = {"loss/discriminator": loss.detach(), "logit/real": of_real.mean().detach(),
                       "logit/made": of_made.mean().detach()}  # fmt: skip
            if penalised:
                eps = streams.normal(*real.shape[1:]).to(real)
                moved = network(real + SIGMA * eps, layout).float()
                penalty = ((moved - of_real).mean(1) / SIGMA).square().mean()
                loss = loss + c.r1_weight / 2 * c.r1_every * penalty  # lazily: as much as if it were in every step
                numbers["r1"] = penalty.detach()
        self.optimizers["discriminator"].zero_grad()
        loss.backward()
        self.optimizers["discriminator"].step()
        return numbers

    # ---- words and files

    def _record(self, known: Callable[[str], ModelRecord | None] | None, fingerprint: str) -> ModelRecord:
        """What is known of the model that was sharpened, and how it was."""
        record = (None if known is None else known(fingerprint)) or ModelRecord(fingerprint)
        settings = {key: value for key, value in self.config.plain().items() if key not in OF_MACHINES}
        earlier = record.training.get(SHARPENED, [])
        own = {**settings, "steps": self.step, "precision": self.precision, "changes": self.changes}
        training = {**record.training, SHARPENED: [*earlier, own]}
        return replace(record, fingerprint=fingerprint, training=training, evaluations=(), pictures={})

    def _open(self) -> None:
        for sub in ("recon", "checkpoints"):
            (self.out / sub).mkdir(parents=True, exist_ok=True)
        lock.take(self.out)
        ckpt.clean(self.out / "checkpoints", self.step)
        trim(self.out / "metrics.jsonl", self.step)
        changes = "".join(f"# from step {c['step']}: {c['setting']} {c['from']} -> {c['to']}\n" for c in self.changes)
        write_text(self.out / FINETUNED, changes + self.config.to_yaml())
        write_json(self.out / "env.json", environment(self.processes.device, 1, self.precision))

    def _announce(self, journal: Journal) -> None:
        trained = sum(p.numel() for p in self.parts.decoder.parameters())
        judged = sum(p.numel() for p in self.parts.discriminator.parameters())
        journal.say(
            f"sharpening the decoder of {self.source}: {trained:,} parameters, a discriminator of {judged:,} from the "
            f"encoder, {count_of(self.config.steps, 'step')} of {self.config.batch_size}, {self.processes.device}, "
            f"{self.precision}"
        )
        for line in self.skipped_checkpoints:
            journal.say(f"skipped: {line}")
        if self.step:
            journal.say(f"resumed at step {self.step}")
        for change in self.changes:
            if change["step"] == self.step:
                journal.say(f"changed: {change['setting']} {change['from']} -> {change['to']}")
        if self.step > self.config.steps:
            journal.say(
                f"warning: steps={self.config.steps}, but step {self.step} is saved: nothing is left to train, and the "
                f"model is that of step {self.step}"
            )

    def _draw(self) -> None:
        """Held-out samples above their reconstructions by the averaged decoder."""
        modality, count = self.model.modality, shown_size(self.splits, DRAWN)
        data = shown_batch(self.splits, modality, range(count), count).data
        with self.ema.applied(self.parts.decoder):
            self.model.eval()
            made = reconstruct(self.model, data, precision=self.precision)
        modality.draw_grid([data, made], self.out / "recon" / f"step_{self.step:08d}.png")


def _same(tensors: dict[str, Tensor], _: object) -> dict[str, Tensor]:
    return tensors


FREE = (
    "learning_rate", "discriminator_learning_rate", "steps", "workers", "threads", "device", "log_every",
    "sample_every", "checkpoint_every", "keep_checkpoints",
)  # fmt: skip
"""Settings that may differ when a fine-tuning goes on."""
OF_MACHINES = ("workers", "threads", "device", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints")
"""Settings that a record leaves out."""
LEARNING = ("learning_rate", "discriminator_learning_rate")
"""Those of FREE that change its result: their changes are recorded."""
