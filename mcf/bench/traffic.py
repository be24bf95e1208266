"""`python -m mcf.bench part=traffic`: what a step's networks move and multiply, counted without a GPU, and what bounds them.

    eager      every operation that PyTorch calls: one launch, which reads its inputs and writes its outputs
    compiled   the graph of a block: matrix products and attention are launches as before; what lies between two of them,
               connected by data, is one launch, which reads and writes at its ends alone

A step runs on the CPU with two and with four images of the recipe's size; bytes and operations of every launch grow linearly
with the batch, so that two steps tell those of any. A launch takes at least the longer of its operations at the rate of
matrix products and its bytes at the rate of memory: their sum is a bound that no GPU of these rates beats, and no
measurement.

Our kernels are counted as their references' operations, which are more; heads, contrast, optimiser and average are left out.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from functorch.compile import make_boxed_func
from pydantic import Field
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mcf import cli
from mcf.bench import alone
from mcf.bench.blocks import NONE, build
from mcf.bench.files import JsonFile, save
from mcf.config import Positive, Recipe, Section
from mcf.errors import UserError
from mcf.models.regional import compile_blocks
from mcf.models.teacher import Teacher

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "attention fused": {"attention": "sdpa"},
    "teacher's stream bf16": {"stream": True},
    "compiled blocks": {"compile": True},
    "attention, compiled": {"attention": "sdpa", "compile": True},
    "all": {"attention": "sdpa", "compile": True, "stream": True},
    "all, teacher in float8": {"attention": "sdpa", "compile": True, "stream": True, "float8": True},
}
KINDS = ("products", "attention", "between")
FLOAT8_RATE = 2.0
SMALL = 2  # images of the smaller step; the larger one has twice as many
# A new tensor, or one that is only looked at otherwise, launches nothing.
NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "detach", "lift_fresh",
           "sym_size", "_local_scalar_dense")  # fmt: skip
CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class TrafficConfig(Section):
    """Count what the networks of a step (bfloat16 by autocast) move and multiply, and what bounds them on a GPU.

    Every key of the recipe (default vit_b_20m) can be given beside these. Nothing is timed. The default rates are an H200's as they were given to us; products in float8 count as twice as fast as in bfloat16.
    """

    part: Literal["traffic"] = Field("traffic", description="which benchmark")
    batch: Positive = Field(256, description="images of a step")
    tflops: float = Field(790.0, gt=0, description="rate of bfloat16 matrix products, 10¹² operations a second")
    terabytes: float = Field(4.3, gt=0, description="rate of the GPU's memory, 10¹² bytes a second")
    launch_us: float = Field(6.0, ge=0, description="time that the host takes for a launch, microseconds")
    json_file: JsonFile | None = Field(None, description="file for all numbers as JSON")


@dataclass(frozen=True)
class Launch:
    """One thing that a GPU is told to do. flops: of matrix products; bytes: read and written; rate: of its products, in
    bfloat16's."""

    kind: str
    flops: float
    bytes: float
    rate: float = 1.0


@cli.main
def main(argv: list[str]) -> int:
    """The part."""
    recipe, config = alone.load(argv, TrafficConfig, "traffic")
    shape = shape_of(recipe)
    print(f"networks of {recipe.name}, batch {config.batch}: counted, not measured; bounds at {config.tflops:g} TFLOP/s and "
          f"{config.terabytes:g} TB/s, {config.launch_us:g} µs a launch\n{'':24}{'launches':>9}{'host ms':>9}{'GFLOP/img':>11}{'GB/img':>8}"
          f"{'products':>10}{'attention':>10}{'between':>9}{'images/s':>10}{'MFU':>6}", flush=True)  # fmt: skip
    rows, model_flops = {}, 0.0
    for name, keys in VARIANTS.items():
        one, two = (count(shape, {**NONE, **keys}, images) for images in (SMALL, 2 * SMALL))
        launches = at_batch(one, two, config.batch)
        row = bound(launches, config)
        model_flops = model_flops or row["flops"]  # written out, attention computes nothing twice
        row["mfu"] = model_flops / row["seconds"] / config.tflops / 1e12
        rows[name] = row
        print(line(name, row, config.batch), flush=True)
    save(config.json_file, {**config.model_dump(), "recipe": recipe.name, "shape": shape, "rows": rows})
    return 0


def shape_of(recipe: Recipe) -> dict[str, Any]:
    """The networks of a recipe as `mcf.bench.blocks` builds them; UserError for what it does not."""
    model, decoder, teacher = recipe.model, recipe.model.decoder, recipe.teacher
    plain = {
        "loss.feature": (recipe.loss.feature > 0, True), "model.variant": (model.variant, "plain"),
        "model.mlp_ratio": (model.mlp_ratio, 4.0), "mask.momentum": (recipe.mask.momentum == "none", False),
        "teacher.patch_size": (teacher.patch_size, model.patch_size),
    }  # fmt: skip
    for key, (value, only) in plain.items():
        if value != only:
            raise UserError(
                f"part=traffic: recipe {recipe.name} differs in {key} from what is counted; leave it as in vit_b_20m"
            )
    return {
        "size": model.image_size, "patch": model.patch_size, "width": model.width, "depth": model.depth, "heads": model.heads,
        "decoder": (decoder.width, decoder.depth, decoder.heads), "taps": teacher.taps,
        "teacher": (teacher.width, teacher.depth, teacher.heads), "keep": recipe.visible_patches,
    }  # fmt: skip


def bound(launches: Sequence[Launch], config: TrafficConfig) -> dict[str, Any]:
    """What launches come to: their number, flops, bytes, least seconds of each kind and of all, the host's seconds."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for launch in launches:
        seconds[launch.kind] += max(launch.flops / launch.rate / config.tflops, launch.bytes / config.terabytes) / 1e12
    return {
        "launches": len(launches), "host_seconds": len(launches) * config.launch_us / 1e6,
        "flops": sum(launch.flops for launch in launches), "bytes": sum(launch.bytes for launch in launches),
        "of_kind": seconds, "seconds": sum(seconds.values()),
    }  # fmt: skip


def line(name: str, row: dict[str, Any], batch: int) -> str:
    """A row for a person; milliseconds are of a step."""
    kinds = "".join(f"{1e3 * row['of_kind'][kind]:{width}.1f}" for kind, width in zip(KINDS, (10, 10, 9)))
    return (
        f"{name:24}{row['launches']:9}{1e3 * row['host_seconds']:9.1f}{row['flops'] / batch / 1e9:11.1f}"
        f"{row['bytes'] / batch / 1e9:8.3f}{kinds}{batch / row['seconds']:10.0f}{row['mfu']:6.0%}"
    )


def count(shape: dict[str, Any], levers: dict[str, Any], images: int) -> list[Launch]:
    """The launches of one forward and backward pass of the networks, with levers as of `mcf.bench.blocks`."""
    networks = build(shape, torch.device("cpu"), {**levers, "compile": False})
    counter = Launches()
    if levers["compile"]:
        torch._dynamo.reset()  # blocks of another shape are compiled alike, and are not to be taken for these
        parts = (networks.encoder, networks.momentum, networks.decoder, networks.teacher)
        compile_blocks(*parts, backend=counter.backend())
        for part in parts:
            vit = part.vit if isinstance(part, Teacher) else part
            vit.blocks = nn.ModuleList(Uncounted(block, counter) for block in vit.blocks)
    pictures = torch.zeros(images, shape["size"], shape["size"], 3, dtype=torch.uint8)
    with counter:
        networks.step(pictures, shape["patch"])
    return counter.found


def at_batch(one: Sequence[Launch], two: Sequence[Launch], batch: int) -> list[Launch]:
    """The launches of a step of `batch` images, from those of SMALL and of twice as many."""
    if [launch.kind for launch in one] != [launch.kind for launch in two]:
        raise ValueError("a larger batch makes other launches")
    times = batch / SMALL - 1
    return [
        replace(a, flops=a.flops + times * (b.flops - a.flops), bytes=a.bytes + times * (b.bytes - a.bytes))
        for a, b in zip(one, two)
    ]


class Launches(TorchDispatchMode):
    """Finds every operation that would be a launch, in `found`; graphs that its backend compiles count as they are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Launch] = []
        self._within = False

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        if not self._within and _computes(function):
            read = _tensors((arguments, named))
            self.found.append(_launch(function, arguments, named or {}, out, read))
        return out

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Find nothing, and be out of the way: what is compiled would not be while operations are watched."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def backend(self) -> Callable:
        """For `torch.compile`: runs a graph as it is, and counts its launches at every call."""

        def compiler(graph: fx.GraphModule, _: Sequence[Tensor]) -> Callable:
            launches = of_graph(graph.graph)

            def run(*inputs: Tensor) -> Any:
                self.found += launches
                with self._inside():
                    return graph(*inputs)

            return make_boxed_func(run)

        return aot_autograd(
            fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition
        )

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self._within = True
        try:
            yield
        finally:
            self._within = False


class Uncounted(nn.Module):
    """A compiled block, whose backend counts."""

    def __init__(self, block: nn.Module, counter: Launches):
        super().__init__()
        self.block, self.counter = block, counter

    def forward(self, x: Tensor) -> Tensor:
        with self.counter.paused():
            return self.block(x)


def of_graph(graph: fx.Graph) -> list[Launch]:
    """Launches of a graph of ATen operations, if all between products and attention that hangs together were one each."""
    source: dict[fx.Node, fx.Node] = {}  # of a view: what it looks at
    level: dict[fx.Node, int] = {}
    group: dict[fx.Node, fx.Node] = {}  # union-find over operations between products

    def root(node: fx.Node) -> fx.Node:
        while group[node] is not node:
            node = group[node]
        return node

    launches: list[Launch] = []
    for node in graph.nodes:
        inputs = [source[n] for n in node.all_input_nodes]
        source[node] = node
        level[node] = max((level[n] + (n not in group and n.op == "call_function") for n in inputs), default=0)
        if node.op != "call_function":
            continue
        if _is_item(node) or not _computes(node.target):
            # A view, one of several results, or nothing: it stands for what it is taken from.
            source[node] = inputs[0] if inputs else node
            if not inputs:
                group[node] = node
        elif _kind(node.target) != "between":
            values = [n.meta["val"] for n in dict.fromkeys(node.all_input_nodes)]
            arguments = fx.map_arg(node.args, lambda n: n.meta["val"])
            named = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
            out = node.meta["val"]
            launches.append(_launch(node.target, arguments, named, out, values))
        else:
            group[node] = node
            for other in inputs:
                if other in group and level[other] == level[node]:
                    group[root(other)] = root(node)
    return launches + _fused(graph, source, group, root)


def _fused(
    graph: fx.Graph,
    source: dict[fx.Node, fx.Node],
    group: dict[fx.Node, fx.Node],
    root: Callable[[fx.Node], fx.Node],
) -> list[Launch]:
    """A launch for each group: it reads what comes from outside once, and writes what is used outside."""
    read: dict[fx.Node, dict[fx.Node, int]] = defaultdict(dict)
    written: dict[fx.Node, dict[fx.Node, int]] = defaultdict(dict)
    for node in graph.nodes:
        if node.op == "call_function" and source[node] is not node:
            continue  # a view moves nothing
        here = root(node) if node in group else None
        for given in node.all_input_nodes:
            origin = source[given]
            there = root(origin) if origin in group else None
            if here is not None and here is there:
                continue
            # Of several results the one that is used; of a view what it looks at, since it may be read in part only.
            if here is not None:
                read[here][given] = min(
                    _bytes(_tensors(given.meta.get("val"))), _bytes(_tensors(origin.meta.get("val")))
                )
            if there is not None:
                result = given if _is_item(given) else origin
                written[there][result] = _bytes(_tensors(result.meta.get("val")))
    groups = dict.fromkeys(root(node) for node in group if source[node] is node)
    return [Launch("between", 0, sum(read[g].values()) + sum(written[g].values())) for g in groups if written[g]]


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _computes(function: Any) -> bool:
    """Whether an operation is more than another look at a tensor."""
    if not isinstance(function, torch._ops.OpOverload) or _name(function) in NOTHING:
        return False
    returned = [r.alias_info for r in function._schema.returns]
    return not any(alias is not None and not alias.is_write for alias in returned)


def _name(function: Any) -> str:
    return function.overloadpacket.__name__


def _kind(function: Any) -> str:
    name = _name(function)
    if "attention" in name or name in ("bmm", "baddbmm"):
        return "attention"  # products of all images at once are attention's alone here
    return "products" if function.overloadpacket in flop_registry else "between"


def _launch(function: Any, arguments: Any, named: Any, out: Any, read: Sequence[Tensor]) -> Launch:
    kind, flops = _kind(function), 0.0
    if _name(function) == CPU_ATTENTION:
        q, k = arguments[:2]
        flops = 4.0 * q.numel() * k.shape[-2]
    elif _name(function) == f"{CPU_ATTENTION}_backward":
        q, k = arguments[1:3]
        flops = 10.0 * q.numel() * k.shape[-2]  # five products, the scores once more among them
    elif function.overloadpacket in flop_registry:
        flops = float(flop_registry[function.overloadpacket](*arguments, **named, out_val=out))
    rate = FLOAT8_RATE if _name(function) == "_scaled_mm" else 1.0
    return Launch(kind, flops, _bytes(read) + _bytes(_tensors(out)), rate)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, of each once; what is broadcast counts as it lies in memory."""
    total = 0
    for tensor in {id(t): t for t in tensors}.values():
        elements = 1
        for size, stride in zip(tensor.shape, tensor.stride()):
            elements *= size if stride or not size else 1
        total += elements * tensor.element_size()
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
