"""The UNITE authors' checkpoints (.pt, a dict with `model` and `ema`) as a `UNITE` model.

Key names and shapes are facts of that format. Sizes are read off the shapes; the decoder's head count, which no shape
shows, follows from its width. Nothing is unpickled but tensors and plain containers.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..conditions.class_label import ClassLabelConfig
from ..methods.base import ModelConfig, SamplingConfig, load_weights
from ..methods.unite import UNITE, DecoderConfig, GenerativeEncoderConfig, UNITEConfig
from ..modalities.image import ImageConfig

# Official prefix -> ours. Longer prefixes come first.
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
"""Width of a decoder head by width of the decoder; 64 is a size made for tests."""


def read_checkpoint(path: Path, weights: Literal["ema", "model"] = "ema") -> dict[str, Tensor]:
    """One of the two sets of weights, `_orig_mod.` stripped; ValueError names the file and what is wrong."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the .pt file of a UNITE checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = "holds objects other than tensors, which are not loaded" if "weights_only" in str(error) else "damaged"
        raise ValueError(f"{path}: {reason} or not a torch checkpoint; download it again from its authors") from None
    if not isinstance(content, dict) or not isinstance(content.get(weights), dict):
        keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: no {weights!r} weights in it (found {keys}); is it a UNITE checkpoint?")
    return {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in content[weights].items()}


def recognise(state: dict[str, Tensor], image_size: int | tuple[int, int] | None = None) -> ModelConfig:
    """The configuration whose shapes these are. image_size: None for a square of as many patches as latents."""
    width, _, patch, _ = _shape(state, "patch_embed.patch_embeddings.projection.weight")
    _, num_latents, _ = _shape(state, "latent_tokens")
    side = math.isqrt(num_latents)
    if image_size is None and side * side != num_latents:
        raise ValueError(f"image size: {num_latents} latents form no square; give image_size=(height, width)")
    decoder_width, stem_width = _shape(state, "decoder.decoder_embed.weight")
    rows, _ = _shape(state, TABLE)
    return ModelConfig(
        modality=ImageConfig(size=image_size or side * patch, patch_size=patch, perceptual_weight=1.0),
        conditions={"class_label": ClassLabelConfig(num_classes=rows - 2, reserved_rows=2)},
        method=UNITEConfig(
            latent_channels=_shape(state, "encoder.up_sample.weight")[1],
            generative_encoder=GenerativeEncoderConfig(
                width=width,
                depth=_count(state, "encoder.blocks."),
                heads=width // _shape(state, "encoder.blocks.0.attn.q_norm.weight")[0],
                in_context_tokens=_shape(state, "encoder.in_context_posemb")[1],
                block_norm="encoder.blocks.0.norm3.weight" in state,
            ),
            decoder=DecoderConfig(
                width=decoder_width,
                depth=_count(state, "decoder.decoder_layers."),
                heads=_heads(decoder_width),
                mlp_width=_shape(state, "decoder.decoder_layers.0.ffn_up.weight")[0],
                stem_width=stem_width,
            ),
        ),
        sampling=official_sampling(),
    )


def official_sampling() -> SamplingConfig:
    """The authors' sampling settings, with Heun steps in place of the adaptive solver that couples batch mates."""
    return SamplingConfig(
        solver="heun", num_inference_steps=50, time_shift=2.0, guidance_scale=3.4, guidance_interval=(0.0, 0.9)
    )


def convert(
    path: Path, weights: Literal["ema", "model"] = "ema", image_size: int | tuple[int, int] | None = None
) -> UNITE:
    """The model of a checkpoint file, in evaluation mode; every trained tensor of the file is in it."""
    state = read_checkpoint(path, weights)
    model = UNITE(recognise(state, image_size))
    load_weights(model, rename(state), path)
    return model.eval()


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors under our names and shapes; ValueError on a tensor this package would have to drop."""
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
        return value.permute(0, 2, 3, 1).flatten(1)  # (H, c, p, q) -> (H, p q c), the order of our tokens
    return value[0] if key == "latent_tokens" else value


def _shape(state: dict[str, Tensor], key: str) -> Any:
    if key not in state:
        raise ValueError(f"{key}: missing; is it a UNITE checkpoint?")
    return state[key].shape


def _count(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix))


def _heads(width: int) -> int:
    if width not in HEAD_WIDTHS:
        raise ValueError(f"width {width} is none of the published sizes ({', '.join(map(str, HEAD_WIDTHS))})")
    return width // HEAD_WIDTHS[width]
