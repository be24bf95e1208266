"""Run by test_aot in a process of its own: which specialisations launchers choose, and which of them are no variants.

The benchmark's shapes run on the CPU as if it were a GPU; Triton's launch itself is replaced by one that keeps what it
is given and computes nothing. The last line printed is JSON: {"launches": N, "unknown": [text]}.
"""

import importlib
import json
from types import SimpleNamespace

import torch
from triton.runtime.jit import JITFunction

from mcf.kernels import aot, dispatch
from mcf.kernels.bench import gate, registry

CHIP = "sm_90"
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


def kind(parameter, value) -> str:
    """Triton's type of an argument, as in a signature. An integer of 1 is a constant, where that is not forbidden."""
    if parameter.annotation_type:
        return parameter.annotation_type
    if isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
        return "constant"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def main() -> None:
    launches = {}

    def keep(self, *args, grid, warmup, **options):
        parameters = {parameter.name: parameter for parameter in self.params}
        given = dict(zip(parameters, args)) | {name: options[name] for name in parameters if name in options}
        constexprs = {name: value for name, value in given.items() if parameters[name].is_constexpr}
        others = {name: value for name, value in given.items() if name not in constexprs}
        types = {name: kind(parameters[name], value) for name, value in others.items()}
        key = name_of(self, constexprs, types, options["num_warps"], options["num_stages"])
        multiples = {n for n, v in others.items() if isinstance(v, int) and v % 16 == 0}
        launches.setdefault(key, []).append(multiples)

    JITFunction.run = keep
    # All that would ask for a device.
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    dispatch.unavailable = lambda device: ""
    for op in aot.OPERATIONS:
        module = importlib.import_module(f"mcf.kernels.{op}")
        if hasattr(module, "chip_of"):
            module.chip_of = lambda device: CHIP
    # Memory that is never touched costs nothing, however large.
    registry._normal = lambda generator, dtype, *shape: torch.empty(*shape, dtype=dtype)
    torch.randint = lambda *args, generator=None, **options: torch.zeros(args[-1], **options) if args[-1] else 2**40

    for dtype in (torch.bfloat16, torch.float32):
        for case in registry.cases("full", dtype):
            arguments = gate.leaves(case, case.make(torch.Generator()))
            outputs = [x for x in gate.tensors(case.functions["triton"](*arguments)) if x.requires_grad]
            if case.learn:
                above = [torch.empty_like(x) for x in outputs]
                torch.autograd.grad(outputs, [arguments[i] for i in case.learn], above)

    known = {}
    for op in aot.OPERATIONS:
        for variant in aot.variants(op, CHIP):
            types = {name: kind for name, kind in variant.signature.items() if kind != "constexpr"}
            key = name_of(variant.kernel, dict(variant.constexprs), types, variant.num_warps, variant.num_stages)
            known[key] = set(variant.divisible)
    unknown = [key for key in launches if key not in known]
    unknown += [
        f"{key}: not multiples of 16: {known[key] - seen}"
        for key, all_seen in launches.items()
        for seen in all_seen
        if key in known and known[key] - seen
    ]
    print(json.dumps({"launches": len(launches), "unknown": sorted(set(unknown))}))


def name_of(kernel, constexprs, types, warps, stages) -> str:
    """All that makes one specialisation another."""
    return (
        f"{kernel.__module__}.{kernel.__name__} {sorted(constexprs.items())} {sorted(types.items())} {warps} {stages}"
    )


main()
