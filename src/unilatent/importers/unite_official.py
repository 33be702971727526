"""Convert the UNITE authors' checkpoints (.pt, a dict with `model` and `ema`) to a `UNITE` model.

Key names and shapes are facts of that format. Sizes are derived from the shapes; the decoder's number of heads, which
no shape shows, follows from its width. Only tensors and plain containers are unpickled.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from ..conditions.class_label import ClassLabelConfig
from ..methods.unite import UNITE, DecoderConfig, GenerativeEncoderConfig, UNITEConfig
from ..modalities.image import ImageConfig
from ..model_config import ModelConfig, SamplingConfig
from ..model_folder import assemble

# Official prefix -> prefix here. Longer prefixes come first.
RENAMES = {
    "patch_embed.patch_embeddings.projection.": "generative_encoder.data_in.",
    "encoder.up_sample.": "generative_encoder.latent_in.",
    "encoder.in_context_posemb": "generative_encoder.transformer.in_context",
    "encoder.t_embedder.W": "generative_encoder.transformer.time.frequencies",
    "encoder.t_embedder.mlp.0.": "generative_encoder.transformer.time.hidden.",
    "encoder.t_embedder.mlp.2.": "generative_encoder.transformer.time.out.",
    "encoder.final_layer.norm_final.": "generative_encoder.transformer.out_norm.",
    "encoder.final_layer.linear.": "generative_encoder.transformer.out.",
    "encoder.final_layer.adaLN_modulation.1.": "generative_encoder.transformer.out_modulation.",
    "encoder.blocks.": "generative_encoder.transformer.blocks.",
    "encoder_layer_norm.": "latent_norm.",
    "latent_tokens": "generative_encoder.latent_positions",
    "up_sample_decoder.": "decoder.stem.",
    "decoder.trainable_cls_token": "decoder.transformer.class_token",
    "decoder.decoder_embed.": "decoder.latent_in.",
    "decoder.decoder_layers.": "decoder.transformer.blocks.",
    "decoder.decoder_norm.": "decoder.transformer.norm.",
    "decoder.decoder_pred.": "decoder.out.",
}
INNER = {
    ".adaLN_modulation.1.": ".modulation.", ".layernorm_before.": ".norm1.", ".layernorm_after.": ".norm2.",
    ".attn_proj.": ".attn.proj.", ".ffn_up.": ".up.", ".ffn_down.": ".down.",
}  # fmt: skip
TABLE = "encoder.y_embedder.embedding_table.weight"
SPECIAL_TIME = "encoder.t_embedder.special_time_emb"
DERIVED = ("encoder.pos_embed", "encoder.feat_rope", "decoder.decoder_pos_embed", "lpips_loss.")
PATCH_POSITIONS = "patch_embed.position_embeddings"
HEAD_WIDTHS = {64: 16, 384: 64, 768: 64, 1024: 64, 1152: 72}
"""Width of a decoder head by width of the decoder; width 64 is for tests."""


def read_checkpoint(path: Path, weights: Literal["ema", "model"] = "ema") -> dict[str, Tensor]:
    """Read the EMA or the raw weights of a checkpoint, without the prefixes `_orig_mod.` and `module.`.

    ValueError names the file and the fault.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the .pt file of a UNITE checkpoint")
    if is_unsafe(torch.__version__):
        warnings.warn(
            f"torch {torch.__version__} reads damaged .pt files unsafely (CVE-2026-24747); update to torch 2.10 or "
            f"newer, or convert only files you trust: {path}",
            stacklevel=2,
        )
    _refuse_compressed(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, or anything else that a crafted file raises
        if "weights_only" in str(error):
            raise ValueError(
                f"{path}: holds objects other than tensors, which are never loaded (they can run code); ask its "
                "authors for plain tensors or safetensors, or save it again with the code that wrote it"
            ) from None
        raise ValueError(f"{path}: damaged or not a torch checkpoint; download it again from its authors") from None
    if not isinstance(content, dict) or not isinstance(content.get(weights), dict):
        keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: no {weights!r} weights in it (found {keys}); is it a UNITE checkpoint?")
    for key, value in content[weights].items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"{path}: {key!r:.80} of {weights!r} is not a plain tensor; is it a UNITE checkpoint?")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: {key!r:.80} claims {value.numel():,} numbers that are not in the file")
    return {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in content[weights].items()}


def is_unsafe(version: str) -> bool:
    """Whether this torch's weights_only reader has CVE-2026-24747 (fixed in 2.10)."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return (major, minor) < (2, 10)


def _refuse_compressed(path: Path) -> None:
    """Refuse a compressed archive, which could fill the memory; torch.save never compresses."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except Exception:  # an older format, which is no zip; or a damaged file, which torch.load reports
        return
    if unpacked > 2 * path.stat().st_size + 2**20:
        raise ValueError(
            f"{path}: unpacks to {unpacked / 2**30:.2f} GiB, but torch.save does not compress; download it again from "
            "its authors"
        )


def recognise(state: dict[str, Tensor], image_size: int | tuple[int, int] | None = None) -> ModelConfig:
    """Derive the configuration from the shapes of the weights.

    image_size: None takes a square with as many patches as latents.
    """
    width, _, patch, _ = _shape(state, "patch_embed.patch_embeddings.projection.weight", 4)
    _, num_latents, _ = _shape(state, "latent_tokens", 3)
    side = math.isqrt(num_latents)
    if image_size is None and side * side != num_latents:
        raise ValueError(f"image_size: {num_latents} latents do not form a square; give image_size=(height, width)")
    decoder_width, stem_width = _shape(state, "decoder.decoder_embed.weight", 2)
    rows, _ = _shape(state, TABLE, 2)
    return ModelConfig(
        modality=ImageConfig(size=image_size or side * patch, patch_size=patch, perceptual_weight=1.0),
        conditions={"class_label": ClassLabelConfig(num_classes=rows - 2, reserved_rows=2)},
        method=UNITEConfig(
            latent_channels=_shape(state, "encoder.up_sample.weight", 2)[1],
            generative_encoder=GenerativeEncoderConfig(
                width=width,
                depth=_count(state, "encoder.blocks."),
                heads=width // _shape(state, "encoder.blocks.0.attn.q_norm.weight", 1)[0],
                in_context_tokens=_shape(state, "encoder.in_context_posemb", 3)[1],
                block_norm="encoder.blocks.0.norm3.weight" in state,
            ),
            decoder=DecoderConfig(
                width=decoder_width,
                depth=_count(state, "decoder.decoder_layers."),
                heads=_heads(decoder_width),
                mlp_width=_shape(state, "decoder.decoder_layers.0.ffn_up.weight", 2)[0],
                stem_width=stem_width,
            ),
        ),
        sampling=official_sampling(),
    )


def official_sampling() -> SamplingConfig:
    """Return the authors' sampling settings, with Heun steps in place of their adaptive solver (dopri5), whose steps
    couple the samples of a batch."""
    return SamplingConfig(
        solver="heun", num_inference_steps=50, time_shift=2.0, guidance_scale=3.4, guidance_interval=(0.0, 0.9)
    )


def convert(
    path: Path, weights: Literal["ema", "model"] = "ema", image_size: int | tuple[int, int] | None = None
) -> UNITE:
    """Convert a checkpoint file to a model, in evaluation mode. Every trained tensor of the file is in it."""
    state = read_checkpoint(path, weights)
    try:
        config = recognise(state, image_size)
        renamed = rename(state)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: its tensors have the shapes of no UNITE model ({reason})") from None
    except RuntimeError as error:  # tensors that cannot be concatenated
        raise ValueError(f"{path}: its tensors do not fit together ({str(error).splitlines()[0]})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model = assemble(config, UNITE, renamed, path)
    assert isinstance(model, UNITE)
    return model


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map official tensors to names and shapes of this package; ValueError on a tensor that has no place in it."""
    if state.get(PATCH_POSITIONS, torch.zeros(())).any():
        raise ValueError(f"{PATCH_POSITIONS}: trained patch positions are not supported; released files hold zeros")
    out = {}
    for key, value in state.items():
        if key.startswith(DERIVED) or key in (PATCH_POSITIONS, SPECIAL_TIME):
            continue
        if key == TABLE:
            special = state.get(SPECIAL_TIME, torch.zeros(value.shape[1]))
            out["conditions.class_label.table.weight"] = torch.cat([value, special.reshape(1, -1)])
            continue
        out[_rename(key)] = _reshape(key, value)
    return out


def _rename(key: str) -> str:
    prefix = next((prefix for prefix in RENAMES if key.startswith(prefix)), None)
    if prefix is None:
        raise ValueError(f"{key}: not a tensor of a UNITE checkpoint; was it written by other code?")
    renamed = RENAMES[prefix] + key[len(prefix) :]
    for old, new in INNER.items():
        renamed = renamed.replace(old, new)
    if key.startswith("decoder.decoder_layers."):
        renamed = renamed.replace(".qkv.", ".attn.qkv.")
    return renamed


def _reshape(key: str, value: Tensor) -> Tensor:
    if key == "patch_embed.patch_embeddings.projection.weight":
        return value.permute(0, 2, 3, 1).flatten(1)  # (H, c, p, q) -> (H, p q c), the order of tokens here
    return value[0] if key == "latent_tokens" else value


def _shape(state: dict[str, Tensor], key: str, axes: int) -> Any:
    if key not in state:
        raise ValueError(f"{key}: missing; is it a UNITE checkpoint?")
    if state[key].ndim != axes or not state[key].numel():
        raise ValueError(f"{key}: shape {tuple(state[key].shape)}, expected {axes} axes; is it a UNITE checkpoint?")
    return state[key].shape


def _count(state: dict[str, Tensor], prefix: str) -> int:
    numbers = [key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)]
    if not numbers or not all(number.isascii() and number.isdigit() and len(number) < 6 for number in numbers):
        raise ValueError(f"{prefix}N: found {', '.join(numbers)[:80] or 'none'}; is it a UNITE checkpoint?")
    return 1 + max(map(int, numbers))


def _heads(width: int) -> int:
    if width not in HEAD_WIDTHS:
        raise ValueError(f"width {width} is not a published size ({', '.join(map(str, HEAD_WIDTHS))})")
    return width // HEAD_WIDTHS[width]
