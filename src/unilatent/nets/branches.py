"""The only place where a network decides by device, or by compilation, how to compute.

| operation               | eager code on a CPU                   | elsewhere                              |
| ----------------------- | ------------------------------------- | -------------------------------------- |
| `layers.RMSNorm`        | a hand-written autograd function      | `F.rms_norm`                           |
| `embeddings.rotate`     | complex products (float32)            | real products                          |
| `attention.attend`      | 16 bits in float32 (also compiled)    | in the inputs' type                    |
| `attention.trim`        | drops tokens that are padding in all  | keeps them: reading the mask waits     |
| `byte_encoder.pieces`   | as many as the longest text has       | always `most`: counting waits          |

On a CPU the left formulas are up to six times faster. Both columns agree to rounding. Tests run the right column on CPU
tensors by replacing `on_cpu`, so callers write `branches.on_cpu` and do not import the function itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU."""
    return x.device.type == "cpu"


def on_eager_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU and the calling code is not being compiled."""
    return on_cpu(x) and not torch.compiler.is_compiling()


def can_read(x: Tensor) -> bool:
    """Whether values of x can be read without waiting for a device; False for tensors without values (`FakeTensor`)."""
    return on_eager_cpu(x) and type(x) is Tensor
