"""Feature extractors of images for evaluation: pixels, Inception, DINOv2, CLIP, LPIPS, and a small classifier.

All of them receive images rounded to 8 bits, as saved to files. An extractor whose weights are missing is an error that
names it, never a network with random weights.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...maths.streams import generator
from ...nets.inception import PUBLISHED, InceptionV3
from ...plain_text import count_of
from ...pretrained import fetch, fingerprint, offline
from ...records import Rows
from .._media import losses
from .._media.render import finite_levels
from ..base import Space
from .metrics import MAX_VALUES

EVALUATION_EXTRA = "pip install 'unilatent[eval]'"
MAX_FITTED = 10_000
"""Largest number of training images that the classifier is fitted to."""
HIDDEN = 64
"""Hidden units of the classifier."""


def levels(images: Tensor) -> Tensor:
    """Round images (B, C, H, W) in [0, 1] to 256 levels: uint8 on their device, a quarter of the bytes to move from
    there. ValueError on NaN or infinity."""
    return finite_levels(images, "image", "B, C, H, W")


class Pixels(Space):
    """`pixels` (B, C * H * W) uint8, in (channel, row, column) order. No output for images of more than 3072 values,
    where distances between raw pixels are not informative."""

    name = "pixels"

    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        if len(data) and data[0].numel() > MAX_VALUES:
            return {}
        return {"pixels": levels(data).flatten(1).cpu()}


class Inception(Space):
    """`pool` (B, 2048), `spatial` (B, 2023), `logits_unbiased` (B, 1008), float32; see `nets.inception`.

    `weights` is the SHA-256 of the weight file; the published one begins with 6726825d.
    """

    name = "inception"
    needs_download = True
    loaded = ("network",)

    def __init__(self, weights: str | None = None, resize: str = "tf1"):
        """weights: a local file; None: a cached download.

        resize: "tf1", as in the original graph and torch-fidelity, or "torch", as in pytorch-fid; numbers of the two
        are not comparable.
        """
        self.file, self.resize = weights, resize

    def prepare(self, device: torch.device) -> None:
        self.network = InceptionV3.load(self.file, self.resize).to(device)
        with fetch(PUBLISHED, self.file).open("rb") as file:
            self.weights = hashlib.file_digest(file, "sha256").hexdigest()
        self.device = device

    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        features = self.network(colours(levels(data)).to(self.device))
        return {name: value.cpu() for name, value in features._asdict().items()}


class PretrainedTransformer(Space):
    """A pretrained vision transformer of the `transformers` package, from a local folder or a hub id.

    Images are resized to a square (bicubic, antialiased), rounded to 8 bits again, and normalised by the network's own
    mean and standard deviation. `weights` is the SHA-256 of the network's tensors, independent of how they are stored.
    """

    needs_download = True
    loaded = ("network",)
    network_class: ClassVar[str]
    feature: ClassVar[str]
    """Name of the network output that is used, (B, D)."""
    mean: ClassVar[tuple[float, float, float]]
    deviation: ClassVar[tuple[float, float, float]]

    def __init__(self, source: str, revision: str | None = None):
        """source: a folder written by `save_pretrained`, or a hub id; revision: of the hub repository."""
        self.source, self.revision = source, revision

    def side(self, config: Any) -> int:
        """Return the side in pixels that images are resized to."""
        return int(config.image_size)

    def prepare(self, device: torch.device) -> None:
        self.network = self._load().to(device).eval().requires_grad_(False)
        self.weights = fingerprint(self.network)
        self.device = device

    def _load(self) -> nn.Module:
        try:
            import transformers
        except ImportError:
            raise ValueError(
                f"the feature extractor {self.name} needs the package transformers: {EVALUATION_EXTRA}, or leave out "
                "the metrics that need it"
            ) from None
        cls = getattr(transformers, self.network_class)
        problem = f"the feature extractor {self.name}: {self.source}"
        way_out = (
            f"give a folder or hub id of a {self.network_class} as --{self.name} (modality.{self.name}=... in a "
            "configuration), or leave out the metrics that need it"
        )
        options = {"output_loading_info": True, "dtype": torch.float32, "local_files_only": offline() is not None}
        try:
            network, report = cls.from_pretrained(self.source, revision=self.revision or "main", **options)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{problem} cannot be loaded ({reason}); {way_out}") from None
        if missing := sorted(report["missing_keys"]) + [str(key) for key in report.get("mismatched_keys", ())]:
            raise ValueError(f"{problem} lacks {count_of(len(missing), 'tensor')}, for example {missing[0]}; {way_out}")
        return network

    @torch.no_grad()
    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        side = self.side(self.network.config)
        images = colours(levels(data)).to(self.device).float() / 255  # (B, 3, H, W)
        if tuple(images.shape[2:]) != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
            images = (images.clamp(0, 1) * 255).round() / 255
        mean, deviation = (images.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.deviation))
        with torch.autocast(self.device.type, enabled=False):
            out = self.network(pixel_values=(images - mean) / deviation)
        return {self.name: getattr(out, self.feature).float().cpu()}


class DINOv2(PretrainedTransformer):
    """`dinov2` (B, D): the normalised class token at 224 x 224, as in Stein et al. 2023 (arXiv:2306.04675), who use
    ViT-L/14 with D = 1024."""

    name = "dinov2"
    network_class = "Dinov2Model"
    feature = "pooler_output"
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, source: str = "facebook/dinov2-large", revision: str | None = None):
        super().__init__(source, revision)

    def side(self, config: Any) -> int:
        """Return 224, rounded down to whole patches; the position table, trained at 518, is interpolated."""
        return max(224 // config.patch_size, 1) * config.patch_size


class CLIP(PretrainedTransformer):
    """`clip` (B, D): the projected embedding, not normalised, as in Jayasumana et al. 2024 (arXiv:2401.09603), who use
    ViT-L/14 at 336 x 336 with D = 768."""

    name = "clip"
    network_class = "CLIPVisionModelWithProjection"
    feature = "image_embeds"
    mean = (0.48145466, 0.4578275, 0.40821073)
    deviation = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, source: str = "openai/clip-vit-large-patch14-336", revision: str | None = None):
        super().__init__(source, revision)


class ClassifierSpace(Space):
    """`hidden` (B, 64), `probabilities` (B, classes) and the `chosen` label (B,) of a small perceptron fitted to real
    labelled images.

    For data sets of small images, for which Inception features are not meaningful. It depends on the training data, so
    numbers are comparable only under equal `weights`, the SHA-256 of the fitted coefficients; other processors and
    library versions round them differently.
    """

    name = "classifier"
    needs = ("pixels",)
    fitted = ("classes", "hidden", "output")

    classes: Tensor | None = None
    """The label of each column of `probabilities`; None before fitting."""

    def fit(self, train: Rows) -> None:
        """Fit to real `pixels` and `labels` on the CPU; with more than 10,000 images, to a fixed random subset.

        Without labels, or with only one class, nothing is fitted and there is no output.
        """
        if "pixels" not in train or "labels" not in train or len(train["labels"].unique()) < 2:
            return
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        subset = torch.randperm(len(train), generator=generator(self.name, "subset"))[:MAX_FITTED]
        images, labels = train["pixels"][subset].float() / 255, train["labels"][subset]
        classifier = MLPClassifier(
            hidden_layer_sizes=(HIDDEN,), activation="relu", solver="adam", alpha=1e-4, batch_size=200,
            learning_rate_init=1e-3, max_iter=100, tol=1e-4, n_iter_no_change=10, random_state=0,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # stopping after 100 epochs is intended
            warnings.filterwarnings("ignore", message="Got `batch_size` less than 1 or larger than sample size")
            classifier.fit(images.numpy(), labels.numpy())
        self.classes = torch.from_numpy(classifier.classes_)
        self.hidden, self.output = (
            _linear(*pair) for pair in zip(classifier.coefs_, classifier.intercepts_, strict=True)
        )
        self.weights = fingerprint(nn.ModuleList([self.hidden, self.output]))

    @torch.no_grad()
    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        if self.classes is None or (len(data) and data[0].numel() > MAX_VALUES):
            return {}
        hidden = self.hidden(_unit(data).double()).relu()  # (B, 64)
        scores = self.output(hidden)  # (B, classes); with two classes (B, 1), the score of the second
        if scores.shape[1] == 1:
            scores = torch.cat([torch.zeros_like(scores), scores], dim=1)
        chosen = self.classes[scores.argmax(1)]
        return {"hidden": hidden.float(), "probabilities": scores.softmax(1).float(), "chosen": chosen}


def _linear(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    """Return a float64 layer that computes x @ weight (in, out) + bias (out,)."""
    layer = nn.Linear(weight.shape[0], weight.shape[1], dtype=torch.float64)
    layer.weight.data, layer.bias.data = torch.from_numpy(weight).double().T, torch.from_numpy(bias).double()
    return layer


def colours(images: Tensor) -> Tensor:
    """Convert (B, 1 or 3, H, W) to (B, 3, H, W): grey becomes three equal channels."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: need 1 or 3 channels, got {images.shape[1]}")
    return images.expand(-1, 3, -1, -1)


def _unit(images: Tensor) -> Tensor:
    """Round images to 8 bits and flatten them: (B, C * H * W) float32 in [0, 1]."""
    return levels(images).flatten(1).cpu().float() / 255


class Perceptual(Space):
    """`lpips` (B,): LPIPS-VGG between reconstructions and their originals."""

    name = "lpips"
    needs_download = True
    compares = True
    loaded = ("network",)

    def __init__(self, weights: str | None = None):
        """weights: a local file with VGG16's weights; None: a cached download."""
        self.file = weights

    def prepare(self, device: torch.device) -> None:
        self.network = losses.lpips(self.file, device)
        self.weights = fingerprint(self.network)
        self.device = device

    def __call__(self, data: Tensor) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def against(self, made: Tensor, data: Tensor) -> dict[str, Tensor]:
        a, b = (colours(levels(x)).to(self.device).float() / 127.5 - 1 for x in (made, data))
        return {"lpips": self.network(a, b).float().cpu().flatten()}
