"""The only place where a network decides by device, or by compilation, how to compute.

| operation                     | eager code on a CPU             | eager code on a GPU          | compiled code |
| ----------------------------- | ------------------------------- | ---------------------------- | ------------- |
| `layers.RMSNorm`              | a hand-written backward pass    | `F.rms_norm`                 | `F.rms_norm`  |
| `layers.LayerNorm`            | weights in float32              | weights in the input's type  | by device     |
| `layers.affine`, `silu_times` | a hand-written backward pass    | the same                     | torch's       |
| rotation in `Attention`       | complex products (float32)      | channels ordered by halves   | torch's       |
| `attention.attend`            | 16 bits in float32              | in the inputs' type          | by device     |
| `attention.trim`              | drops tokens that all pad       | keeps them: reading waits    | keeps them    |
| `byte_encoder.pieces`         | as many as the longest text has | `most`: counting waits       | `most`        |
| `lpips.feature_distance`      | few passes (bfloat16)           | the same                     | torch's       |
| type of LPIPS's convolutions  | float32                         | autocast's                   | by device     |
| `casts.cast_together`         | leaves casts to autocast        | casts a block's weights once | by autocast   |

On a CPU the left formulas are up to six times faster. All columns agree to rounding. Tests run those of a GPU on CPU
tensors by replacing `on_cpu`, so callers write `branches.on_cpu` and do not import the function itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU."""
    return x.device.type == "cpu"


def on_eager() -> bool:
    """Whether the calling code is not being compiled, whatever the device."""
    return not torch.compiler.is_compiling()


def on_eager_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU and the calling code is not being compiled."""
    return on_cpu(x) and on_eager()


def can_read(x: Tensor) -> bool:
    """Whether values of x can be read without waiting for a device; False for tensors without values (`FakeTensor`)."""
    return on_eager_cpu(x) and type(x) is Tensor


def in_autocast(x: Tensor) -> bool:
    """Whether autocast is enabled for the device of x. There is none for tensors without storage (`meta`); to ask torch
    whether there is, breaks compiled graphs of torch 2.10."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def conv_type(x: Tensor) -> torch.dtype:
    """The type that frozen convolutions on x compute in: autocast's on a GPU, else float32."""
    follows = not on_cpu(x) and in_autocast(x)
    return torch.get_autocast_dtype(x.device.type) if follows else torch.float32
