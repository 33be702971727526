"""Train a tokenizer and a latent generator together: UNITE and Unified Latents.

model = unilatent.load("runs/digits")
z = model.encode(images)
images = model.decode(z)
images = unilatent.sample(model, num=16, labels=[3], guidance_scale=2.0, num_inference_steps=50, seed=0)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .loading import load
    from .methods.latent_diffusion import LatentDiffusion
    from .methods.unified_latents import UnifiedLatents
    from .methods.unite import UNITE
    from .nets.activations import record
    from .sampling import decode, encode, reconstruct, sample
    from .types import Given

_HOMES = {
    "load": "loading",
    "sample": "sampling",
    "reconstruct": "sampling",
    "encode": "sampling",
    "decode": "sampling",
    "LatentDiffusion": "methods.latent_diffusion",
    "UNITE": "methods.unite",
    "Given": "types",
    "record": "nets.activations",
    "UnifiedLatents": "methods.unified_latents",
}
__all__ = [
    "UNITE", "Given", "LatentDiffusion", "UnifiedLatents", "__version__", "decode", "encode", "load", "reconstruct",
    "record", "sample",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names on first use, so that `import unilatent` is immediate."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unilatent' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return sorted({*__all__, "__doc__", "__file__", "__name__", "__path__"})
