"""The arrows between modules (DESIGN section 3), read from the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Heavy package → the only modules that may import it.
DOORS = {
    "deepspeed": {"mcf.engine"},
    "fsspec": {"mcf.data.storage"},
    "nvidia": {"mcf.data.dali", "mcf.data.encoding"},  # DALI, and the codecs below it
    "mlflow": {"mcf.track.mlflow"},
    "submitit": {"mcf.submit"},
    "xformers": {"mcf.attention"},
    "triton": {"mcf.kernels.triton_or_none"},
    "onnxscript": {"mcf.weights.onnx"},
    "onnxruntime": {"mcf.weights.onnx"},
    "matplotlib": {"mcf.kernels.bench.plots", "mcf.downstream.charts"},  # kernels import nothing of mcf: a door each
}
# Module or package → what of mcf it may import (itself and its own package always). The longest row that fits holds.
ARROWS = {
    "mcf": set(),
    "mcf.__main__": {"mcf.cli"},
    # What needs nothing but itself.
    "mcf.errors": set(),
    "mcf.mode": set(),
    "mcf.atomic": set(),
    "mcf.caches": set(),
    "mcf.config": {"mcf.errors"},
    "mcf.kernels": set(),
    "mcf.schedule": {"mcf.config"},
    # The command line, and starting a run: no torch.
    "mcf.keys": set(),
    "mcf.settings": {"mcf.config", "mcf.errors", "mcf.keys"},
    "mcf.checks": {"mcf.config", "mcf.errors"},
    "mcf.zero": set(),
    "mcf.machine": {"mcf.config", "mcf.errors", "mcf.keys", "mcf.settings"},
    "mcf.sizes": {"mcf.config", "mcf.zero"},
    "mcf.costs": {"mcf.config", "mcf.machine", "mcf.sizes", "mcf.zero"},
    "mcf.plan": {"mcf.config", "mcf.errors", "mcf.checks", "mcf.costs", "mcf.machine", "mcf.sizes"},
    "mcf.cli": {"mcf.config", "mcf.errors", "mcf.checks", "mcf.exits", "mcf.keys", "mcf.settings"},
    "mcf.snapshot": {"mcf.errors"},
    "mcf.exits": set(),
    "mcf.slurm": {"mcf.errors"},
    "mcf.lock": {"mcf.checkpoint", "mcf.errors", "mcf.heartbeat", "mcf.slurm"},
    "mcf.task": {"mcf.cli", "mcf.config", "mcf.errors", "mcf.exits", "mcf.lock"},
    "mcf.output": {"mcf.track.console"},
    "mcf.ending": {"mcf.checkpoint", "mcf.exits", "mcf.output", "mcf.task", "mcf.track.jsonl"},
    "mcf.follow": {
        "mcf.cli", "mcf.config", "mcf.ending", "mcf.errors", "mcf.exits", "mcf.lock", "mcf.output", "mcf.slurm", "mcf.task",
    },
    "mcf.job": {
        "mcf.cli", "mcf.config", "mcf.ending", "mcf.errors", "mcf.exits", "mcf.output", "mcf.settings",
        "mcf.slurm", "mcf.task", "mcf.track.jsonl",
    },
    "mcf.submit": {"mcf.config", "mcf.errors", "mcf.slurm", "mcf.task"},
    "mcf.launch": {
        "mcf.atomic", "mcf.checkpoint", "mcf.cli", "mcf.config", "mcf.errors", "mcf.machine", "mcf.plan", "mcf.slurm", "mcf.snapshot",
        "mcf.local", "mcf.lock", "mcf.submit", "mcf.task", "mcf.follow",
    },
    "mcf.local": {"mcf.config", "mcf.errors", "mcf.follow", "mcf.lock", "mcf.submit", "mcf.task"},
    # The rooms.
    "mcf.data": {"mcf.atomic", "mcf.config", "mcf.errors", "mcf.exits", "mcf.kernels"},
    "mcf.data.faces": {"mcf.atomic", "mcf.cli", "mcf.config", "mcf.errors"},
    "mcf.pack": {
        "mcf.atomic", "mcf.cli", "mcf.config", "mcf.errors", "mcf.data.shards", "mcf.data.sheet", "mcf.data.dali", "mcf.data.jpeg",
        "mcf.data.encoding", "mcf.data.ustar", "mcf.slurm",
    },
    "mcf.memory": set(),
    "mcf.precision": {"mcf.linear"},
    "mcf.processor": set(),
    "mcf.linear": {"mcf.processor"},
    "mcf.attention_table": {"mcf.errors", "mcf.processor"},
    "mcf.attention": {"mcf.attention_table", "mcf.errors"},
    "mcf.models": {"mcf.attention", "mcf.config", "mcf.errors", "mcf.kernels", "mcf.linear", "mcf.sharding"},
    "mcf.weights": {"mcf.atomic", "mcf.models", "mcf.checkpoint", "mcf.config", "mcf.errors", "mcf.mode"},
    "mcf.track": {"mcf.atomic", "mcf.config", "mcf.errors"},
    "mcf.rendezvous": {"mcf.errors"},
    "mcf.distributed": {"mcf.errors", "mcf.exits", "mcf.rendezvous"},
    "mcf.spread": {"mcf.distributed"},
    "mcf.startup": {"mcf.data.shards", "mcf.distributed", "mcf.errors"},
    "mcf.heartbeat": set(),
    "mcf.watchdog": {"mcf.config", "mcf.exits", "mcf.heartbeat", "mcf.track.jsonl"},
    "mcf.sharding": {"mcf.distributed"},
    "mcf.engine": {"mcf.config", "mcf.distributed", "mcf.errors", "mcf.spread", "mcf.zero"},
    "mcf.checkpoint": {"mcf.errors", "mcf.exits"},
    "mcf.stop": set(),
    "mcf.guard": {"mcf.config", "mcf.errors"},
    "mcf.state": {"mcf.config", "mcf.errors", "mcf.mode"},
    "mcf.step": {
        "mcf.attention", "mcf.config", "mcf.data", "mcf.distributed", "mcf.engine", "mcf.errors", "mcf.kernels", "mcf.models", "mcf.plan",
        "mcf.schedule",
    },
    "mcf.meters": {"mcf.data", "mcf.distributed", "mcf.step"},
    "mcf.downstream": {"mcf.config", "mcf.errors", "mcf.keys", "mcf.models", "mcf.state", "mcf.weights"},
    "mcf.probing": {"mcf.config", "mcf.distributed", "mcf.downstream", "mcf.errors", "mcf.models"},
    # Verbs that bring rooms together.
    "mcf.beginning": {
        "mcf.checkpoint", "mcf.config", "mcf.data", "mcf.distributed", "mcf.models", "mcf.plan", "mcf.precision", "mcf.probing",
        "mcf.spread", "mcf.startup", "mcf.state", "mcf.step", "mcf.watchdog", "mcf.weights",
    },
    "mcf.train": {
        "mcf.atomic", "mcf.beginning", "mcf.caches", "mcf.checkpoint", "mcf.cli", "mcf.config", "mcf.data", "mcf.distributed", "mcf.errors",
        "mcf.exits", "mcf.guard", "mcf.linear", "mcf.lock", "mcf.memory", "mcf.meters", "mcf.rendezvous", "mcf.state", "mcf.step",
        "mcf.stop", "mcf.track", "mcf.watchdog",
    },
    "mcf.inspect": {"mcf.cli", "mcf.config", "mcf.data", "mcf.errors", "mcf.kernels"},
    "mcf.finetuning": {
        "mcf.atomic", "mcf.checkpoint", "mcf.distributed", "mcf.downstream", "mcf.engine", "mcf.errors", "mcf.guard", "mcf.state", "mcf.stop",
        "mcf.track", "mcf.watchdog",
    },
    "mcf.finetune": {
        "mcf.caches", "mcf.atomic", "mcf.checkpoint", "mcf.cli", "mcf.distributed", "mcf.downstream.config", "mcf.errors", "mcf.exits", "mcf.finetuning",
        "mcf.linear", "mcf.local", "mcf.lock", "mcf.memory", "mcf.rendezvous", "mcf.snapshot", "mcf.stop", "mcf.submit", "mcf.task", "mcf.watchdog",
    },
    "mcf.probe": {
        "mcf.caches", "mcf.atomic", "mcf.checks", "mcf.cli", "mcf.config", "mcf.distributed", "mcf.downstream", "mcf.errors", "mcf.linear", "mcf.memory", "mcf.probing",
    },
    "mcf.predict": {"mcf.caches", "mcf.cli", "mcf.config", "mcf.downstream", "mcf.errors", "mcf.linear"},
    "mcf.results": {"mcf.atomic", "mcf.cli", "mcf.config", "mcf.downstream", "mcf.errors", "mcf.track.jsonl"},
    "mcf.demo": {"mcf.cli", "mcf.config", "mcf.errors", "mcf.track.jsonl"},
    "mcf.convert": {"mcf.cli", "mcf.config", "mcf.errors", "mcf.weights"},
    "mcf.export": {
        "mcf.checkpoint", "mcf.cli", "mcf.config", "mcf.downstream.saved", "mcf.errors", "mcf.models", "mcf.track.jsonl",
        "mcf.weights",
    },
    "mcf.parity": {"mcf.cli", "mcf.config", "mcf.errors", "mcf.kernels", "mcf.models", "mcf.weights"},
    "mcf.bench": {
        "mcf.caches", "mcf.checks", "mcf.schedule", "mcf.sizes", "mcf.track.origin", "mcf.attention", "mcf.attention_table", "mcf.cli", "mcf.config", "mcf.costs", "mcf.data", "mcf.distributed", "mcf.errors", "mcf.kernels", "mcf.linear", "mcf.memory", "mcf.models", "mcf.pack",
        "mcf.plan", "mcf.precision", "mcf.processor", "mcf.step", "mcf.weights",
    },
}  # fmt: skip
NEVER = {"torchvision", "timm", "transformers"}
LIGHT = (
    "mcf.launch", "mcf.follow", "mcf.task", "mcf.cli", "mcf.keys", "mcf.settings", "mcf.plan", "mcf.costs", "mcf.machine",
    "mcf.sizes", "mcf.schedule", "mcf.config", "mcf.lock", "mcf.snapshot", "mcf.slurm", "mcf.job", "mcf.submit",
    "mcf.watchdog", "mcf.track.console", "mcf.pack.options", "mcf.convert", "mcf.export",
    "mcf.local", "mcf.finetune", "mcf.predict", "mcf.probe", "mcf.results.__main__", "mcf.downstream.config",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """All modules of the project by their import name; recipes and tests hold none that matter."""
    found = {}
    for folder, package in ((ROOT / "mcf", "mcf"), (ROOT / "kernels", "mcf.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


def imports(name: str, path: Path, *, types_too: bool = False) -> set[str]:
    """Absolute names of everything a module imports, at any depth; not what only a type checker sees."""
    tree = ast.parse(path.read_text())
    hidden = set() if types_too else {id(n) for block in ast.walk(tree) if _for_types(block) for n in ast.walk(block)}
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


MODULES = modules()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_heavy_packages_have_one_door(name):
    for imported in imports(name, MODULES[name]):
        top = imported.partition(".")[0]
        assert top not in NEVER, f"{name} imports {imported}"
        if top in DOORS:
            assert any(_under(name, door) for door in DOORS[top]), f"{name} imports {imported}: only {DOORS[top]} may"


def row_of(name: str) -> str | None:
    """The row of ARROWS that holds for a module; `mcf` is a row of its own file alone."""
    rows = [layer for layer in ARROWS if (name == layer if layer == "mcf" else _under(name, layer))]
    return max(rows, key=len, default=None)


def test_every_module_has_a_row_and_every_row_a_module():
    assert [name for name in MODULES if row_of(name) is None] == [], "give it a row of ARROWS"
    assert set(ARROWS) - {row_of(name) for name in MODULES} == set(), "the module is gone: take its row away"


@pytest.mark.parametrize("layer", sorted(ARROWS))
def test_arrows(layer):
    for name in [name for name in MODULES if row_of(name) == layer]:
        for imported in imports(name, MODULES[name]) & set(MODULES) - {"mcf"}:
            allowed = any(_under(imported, other) for other in ({layer} - {"mcf"}) | ARROWS[layer])
            assert allowed, f"{name} imports {imported}; {layer} may import {sorted(ARROWS[layer])}"


def test_nobody_imports_the_verbs_that_run():
    for name, path in MODULES.items():
        if name.startswith("mcf.bench") or name == "mcf.demo":
            continue
        assert not imports(name, path) & {"mcf.train", "mcf.launch", "mcf.demo"} - {name}, name


def test_login_node_modules_load_neither_torch_nor_anything_heavy():
    heavy = ["torch", "numpy", "deepspeed", "mlflow", "nvidia", "submitit", "xformers", "triton"]
    code = f"import sys, {', '.join(LIGHT)}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_reader_of_imports_sees_all_forms(tmp_path):
    file = tmp_path / "sample.py"
    file.write_text(
        "import a.b\nfrom . import c\nfrom ..d import e\ndef f():\n    import deepspeed\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mlflow\n"
    )
    found = imports("mcf.x.sample", file)
    assert {"a.b", "mcf.x.c", "mcf.d.e", "deepspeed"} <= found
    assert "mlflow" not in found
