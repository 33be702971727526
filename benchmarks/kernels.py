"""Kernels that one training step launches on a GPU, and the bytes they move, counted from shapes on any machine.

python benchmarks/kernels.py                                 imagenet256-unite-b, micro-batches of 64, bf16, LPIPS on
python benchmarks/kernels.py --compile                       as with training.compile, a large preset's default
python benchmarks/kernels.py --preset imagenet512-ul --batch 8
PYTHONPATH=../before/src python benchmarks/kernels.py         the same for another source tree

The step runs on fake tensors, which have shapes and types and no numbers, with the formulas that `nets/branches.py`
takes on a GPU. Of eager code one launch is counted for each operation that computes or copies, more for those in
LAUNCHES. Bytes are the inputs and outputs of each operation, each read or written once; what stays in a GPU's cache is
counted too. What is left to CUDA and cannot run here is replaced: the fused RMS norm, and autocast's float32 norms.

With --compile, the repeated blocks and LPIPS are the kernels that torch's compiler schedules for them (`scheduled.py`),
and only the rest is eager. "compiled" are the kernels that it generates; products, convolutions and attention are
those of libraries as before.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scheduled import Kernel, scheduling
from train_step import a_batch
from unilatent.config import ConfigError
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.modalities.image import ImageConfig
from unilatent.nets.gpu_formulas import gpu_formulas
from unilatent.presets import preset
from unilatent.training.ema import EMA
from unilatent.training.optimizer import Optimizers, clip_gradients
from unilatent.training.parts import differentiate
from unilatent.training.setup import compile_networks

LAUNCHES = {
    "native_layer_norm_backward": 2, "rms_norm_backward": 2, "native_group_norm": 2, "native_group_norm_backward": 3,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3, "embedding_dense_backward": 4,
    "convolution_backward": 2,
}  # fmt: skip
"""Launches of operations that are more than one kernel on CUDA: input and weight gradients, reductions in two passes,
the three passes of flash attention's backward, sorted indices."""
FREE = {
    "detach", "view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select",
    "split", "split_with_sizes", "unbind", "alias", "as_strided", "empty", "empty_like", "new_empty", "device",
    "new_empty_strided", "empty_strided", "is_same_size", "lift_fresh", "chunk", "unfold", "_reshape_alias",
    "view_as_real", "view_as_complex", "is_pinned", "diagonal",
}  # fmt: skip
"""Operations that launch nothing."""
WRITTEN = {"out", "grad_input"}
"""Arguments that are written and not read."""
LIBRARIES = {
    "mm": "matrix products", "addmm": "matrix products", "bmm": "matrix products", "baddbmm": "matrix products",
    "convolution": "convolutions", "convolution_backward": "convolutions",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
}  # fmt: skip
"""Kinds of operations that are more than elementwise."""
CHUNK, CHUNKS, TENSORS = 65536, 320, (110, 64, 48, 36, 30)
"""Of operations on lists of tensors (`_foreach`, fused optimizers): elements of a chunk, chunks of a launch, and
tensors of a launch for one to five lists."""
PLACES = {
    "rotate": "rotary", "rotary": "rotary", "halves": "rotary", "rotate_halves": "rotary",
    "modulate": "modulation", "add_gated": "modulation",
    "affine": "modulation", "fused_rms_norm": "rms norm", "LayerNorm.forward": "layer norm",
    "GroupNorm.forward": "group norm", "SwiGLU.forward": "activations", "silu_times": "activations",
    "LPIPS.forward": "LPIPS", "attend": "attention", "Streams": "noise", "denoising_loss": "losses",
    "terms": "losses", "add_noise": "noising",
}  # fmt: skip
"""Function, method or class whose operations are counted as a kind; their backward passes too."""


class Counted(TorchDispatchMode):
    """Counts launches and bytes by kind while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = Counter[str](), Counter[str]()
        self.kinds: dict[int, str] = {}
        self.paused = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Torch compiles nothing while other modes are active."""
        return True

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if self.paused:
            return out
        name = op.overloadpacket.__name__
        node = torch._C._current_autograd_node()
        kind = _place() if node is None else self.kinds.get(node._sequence_nr(), "other")
        if node is None:  # the node of this operation has been made, and has the number before the next one
            self.kinds.setdefault(torch.autograd._get_sequence_nr() - 1, kind)
        if name in FREE or _is_view(op):
            return out
        if name in ("_to_copy", "copy_", "_foreach_copy_") and len({t.dtype for t in _tensors((args, out))}) > 1:
            kind = "casts"
        elif name == "rms_norm_backward":
            kind = "rms norm"
        self.launches[LIBRARIES.get(name, kind)] += _launches(name, args)
        read = args, {key: value for key, value in (kwargs or {}).items() if key not in WRITTEN}
        self.bytes[LIBRARIES.get(name, kind)] += sum(map(_bytes, _tensors(read))) + sum(map(_bytes, _tensors(out)))
        return out

    def graph(self, kernels: list[Kernel], graph: Callable[..., Any], inputs: list[Any]) -> Any:
        """Call a compiled graph: count its kernels in place of its operations."""
        for name, size in kernels:
            kind = LIBRARIES.get(name, "compiled")
            self.launches[kind] += LAUNCHES.get(name, 1)
            self.bytes[kind] += size
        self.paused = True
        try:
            return graph(*inputs)
        finally:
            self.paused = False

    def elementwise(self, counts: Counter[str]) -> int:
        """The sum over all kinds but matrix products, convolutions and attention."""
        return sum(n for kind, n in counts.items() if kind not in LIBRARIES.values())


def _is_view(op: Any) -> bool:
    return bool(getattr(op, "is_view", False))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(t: Tensor) -> int:
    """Bytes of the different elements of a tensor: those of an expanded axis are one."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)


def _launches(name: str, args: Any) -> int:
    if not name.startswith(("_foreach", "_fused_adam")):
        return LAUNCHES.get(name, 1)
    lists = sum(isinstance(arg, list | tuple) and len(arg) == len(args[0]) for arg in args)
    launches, tensors, room = 1, 0, CHUNKS
    for tensor in args[0]:
        tensors, chunks = tensors + 1, math.ceil(tensor.numel() / CHUNK)
        if tensors > TENSORS[lists - 1] or not room:
            launches, tensors, room = launches + 1, 1, CHUNKS
        further = math.ceil(max(0, chunks - room) / CHUNKS)
        launches, tensors, room = launches + further, 1 if further else tensors, room + further * CHUNKS - chunks
    return launches


def _place() -> str:
    """The kind of the innermost function on the stack that has one."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        qualified = frame.f_code.co_qualname
        for name in (qualified, frame.f_code.co_name, qualified.partition(".")[0]):
            if name in PLACES:
                return PLACES[name]
        frame = frame.f_back
    return "other"


class _NoNumbers(Streams):
    """Streams whose draws are one kernel, as on a GPU."""

    def _blocks(self, numbers: Any, blocks: int) -> Tensor:
        return torch.ones(len(self) * blocks, 4, device=self.device)


def count(
    name: str, size: int, precision: str, perceptual: bool, overrides: list[str], compiled: bool = False
) -> dict[str, Counted]:  # fmt: skip
    """Count one micro-batch's forward and backward pass, and one update of the weights."""
    config = preset(name).override(*overrides).resolved().example()
    if not isinstance(config.modality, ImageConfig):
        raise ConfigError(f"--preset: counted are runs on images, not on {config.modality.name}")
    if not perceptual:
        config = config.override("modality.perceptual_weight=0")
    with FakeTensorMode(allow_non_fake_inputs=True), gpu_formulas():
        model = LatentModel.build(config.model())
        batch = a_batch(model, config, size, torch.device("cpu"))
        streams = _NoNumbers(("count",), range(size))
        optimizers, ema = Optimizers(model, config.training.optimizer), EMA(model, 0.99)
        with compiling(model) if compiled else nullcontext(Counted) as counter:
            for _ in range(2):  # the first makes states, and compiles
                counts = {"forward + backward": counter(), "update": Counted()}
                optimizers.zero_grad()
                with counts["forward + backward"]:
                    differentiate(model, batch, streams, precision)
                with counts["update"]:
                    clip_gradients(model, config.training.gradient_clip)
                    optimizers.step()
                    ema.update(model)
    return counts


@contextmanager
def compiling(model: LatentModel) -> Iterator[Callable[[], Counted]]:
    """Compile the networks that training compiles; what is made in the context counts their graphs while it is used."""
    made: list[Counted] = []

    def counter() -> Counted:
        made.append(Counted())
        return made[-1]

    with scheduling(lambda *call: made[-1].graph(*call)):
        compile_networks(model)
        yield counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="imagenet256-unite-b")
    parser.add_argument("--batch", type=int, default=64, help="samples of the micro-batch")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--no-lpips", action="store_true")
    parser.add_argument("--compile", action="store_true", help="as with training.compile")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    perceptual, how = not options.no_lpips, "compiled" if options.compile else "eager"
    counts = count(options.preset, options.batch, options.precision, perceptual, options.overrides, options.compile)
    print(f"{options.preset}, micro-batch {options.batch}, {options.precision}, torch {torch.__version__}, {how}")
    for phase, counted in counts.items():
        print("\n" + table(phase, counted))


def table(phase: str, counted: Counted) -> str:
    """Launches and GB by kind, in the order of their bytes."""
    rows = [(kind, counted.launches[kind], size) for kind, size in counted.bytes.most_common()]
    rows += [("all", sum(counted.launches.values()), sum(counted.bytes.values()))]
    rows += [("elementwise", *map(counted.elementwise, (counted.launches, counted.bytes)))]
    lines = [f"| {phase} | launches | GB |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {kind} | {number:,} | {size / 1e9:,.1f} |" for kind, number, size in rows])


if __name__ == "__main__":
    main()
