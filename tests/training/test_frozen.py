"""Frozen parameters (a second stage's tokenizer) are stored once: not as EMA weights, nor in the optimizer's state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from building import model_of
from safetensors.torch import load_file, save_file

from unilatent.model_folder import write_config
from unilatent.processes import Processes
from unilatent.training.config import TrainingConfig
from unilatent.training.state import TrainingState

TRAINING = TrainingConfig(steps=1, ema_profiles=(0.1,))


def stepped(state: TrainingState) -> TrainingState:
    """One optimiser step on arbitrary gradients."""
    for p in state.model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.1)
    state.optimizers.step()
    state.ema.update(state.model)
    state.advance()
    return state


def write(state: TrainingState, folder: Path, with_frozen: bool) -> None:
    """Write a checkpoint; with_frozen: as earlier versions did, with frozen parameters among the averages."""
    folder.mkdir()
    frozen = {name: p.detach().clone() for name, p in state.model.named_parameters() if not p.requires_grad}
    for name, tensors in state.tensors().items():
        tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        if with_frozen and name == "ema":
            tensors |= frozen
        if with_frozen and name == "ema_profiles":
            tensors |= {f"0.1/{key}": tensor for key, tensor in frozen.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    write_config(state.model.config, folder / "config.json", "fp32")
    (folder / "state.json").write_text(json.dumps({"step": state.step}))


def test_only_trained_parameters_are_stored_and_averaged(tmp_path: Path):
    state = stepped(TrainingState(model_of("image", "latent_diffusion"), TRAINING))
    write(state, tmp_path / "new", with_frozen=False)
    trained = {name for name, p in state.model.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith("tokenizer.") for name in trained)
    assert load_file(tmp_path / "new" / "ema.safetensors").keys() == trained
    assert load_file(tmp_path / "new" / "ema_profiles.safetensors").keys() == {f"0.1/{name}" for name in trained}
    assert {key.partition("|")[0] for key in load_file(tmp_path / "new" / "optimizer.safetensors")} == trained
    assert any(key.startswith("tokenizer.") for key in load_file(tmp_path / "new" / "model.safetensors"))


def test_the_averaged_model_keeps_the_tokenizer():
    model = model_of("image", "latent_diffusion")
    state = stepped(TrainingState(model, TRAINING))
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    with state.ema.applied(model):
        for name, p in model.named_parameters():
            assert torch.equal(p, live[name]) != p.requires_grad, name
    assert all(torch.equal(p, live[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("with_frozen", [False, True])
def test_checkpoints_of_both_kinds_load(tmp_path: Path, with_frozen: bool):
    state = stepped(TrainingState(model_of("image", "latent_diffusion"), TRAINING))
    write(state, tmp_path / "c", with_frozen)
    other = TrainingState(model_of("image", "latent_diffusion", seed=1), TRAINING)
    other.load(tmp_path / "c", Processes.alone())
    for name, value in state.ema.weights.items():
        assert torch.equal(other.ema.weights[name], value)
    assert other.power_emas.weights.keys() == state.power_emas.weights.keys()


@pytest.mark.parametrize(("file", "name"), [("ema", "other"), ("ema_profiles", "0.2/other")])
def test_an_unknown_average_is_refused(tmp_path: Path, file: str, name: str):
    state = stepped(TrainingState(model_of("image", "latent_diffusion"), TRAINING))
    write(state, tmp_path / "c", with_frozen=False)
    path = tmp_path / "c" / f"{file}.safetensors"
    save_file({**load_file(path), name: torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=f"{file}.safetensors: .*has unknown {name}"):
        state.load(tmp_path / "c", Processes.alone())
