"""The architecture, read from the source: imports only go down, and importing the package costs nothing."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import longctx

PACKAGE = Path(longctx.__file__).parent
ROOT = PACKAGE.parent

PURE = (
    "parallel.degrees",
    "parallel.placement",
    "parallel.plan",
    "parallel.schedule",
    "parallel.slices",
    "parallel.nearest",
    "parallel.nodes",
    "parallel.stages",
    "parallel.moves",
    "parallel.cost",
)

# A module may import its own layer and those above it in this table (the lower ones). kernels and parallel are
# directories; what is inside parallel has an order of its own.
LAYERS = (
    ("L0", ("errors", "shapes", "masks", "padding", "balance", "layout", "sequence")),
    ("L1", ("kernels",)),
    ("L2 pure", PURE),
    (
        "L2 messages",
        (
            "parallel.journal",
            "parallel.agreement",
            "parallel.exchange",
            "parallel.head_exchange",
            "parallel.tensor_exchange",
            "parallel.transport",
            "parallel.mesh",
        ),
    ),
    ("L2", ("parallel.ring", "parallel.operator", "parallel.direct", "parallel.routes", "parallel.gather")),
    ("L2 schemes", ("parallel.ulysses", "parallel.strategy", "parallel.chunks", "parallel.tensor", "parallel.loss")),
    ("L3", ("calls", "flash", "functional")),
    ("L4", ("attention", "rope", "model_config", "initial", "offload", "tiled_mlp", "model")),
    (
        "L5 text and numbers",
        (
            "settings",
            "corpus",
            "tokenizer",
            "tokens",
            "data",
            "telemetry",
            "metrics",
            "results",
            "table_parts",
            "tables_attention",
            "tables",
            "kernel_rules",
        ),
    ),
    (
        "L5 DeepSpeed",
        (
            "optim",
            "deepspeed_setup",
            "engine_config",
            "engine",
            "pipeline",
            "checkpoint_files",
            "checkpoint_folder",
            "checkpoint_state",
            "checkpoint_shards",
            "checkpoint",
            "checkpoint_saver",
        ),
    ),
    ("L5 planning", ("attention_cost", "memory")),
    ("L5 weights", ("hf_config", "checkpoint_weights", "weights")),
    ("L6 Hugging Face", ("hf_masks", "hf_attention", "huggingface", "hf_trainer")),
    ("L6 processes", ("process", "heartbeat", "launch", "watchdog", "testing")),
    (
        "L6 a run",
        ("train_config", "progress", "recorder", "preparation", "trainer", "config_loader", "config", "evaluation"),
    ),
    (
        "L6 benchmark",
        (
            "flash1",
            "peers",
            "predecessors",
            "bench_rounds",
            "bench_timing",
            "bench_output",
            "bench_errors",
            "bench_forms",
            "bench_kept",
            "figures",
            "bench",
            "bench_scaling",
        ),
    ),
    ("L6 ring benchmark", ("peers_ring", "bench_ring_output", "bench_ring_timing", "bench_ring")),
    ("L6 planning", ("step_time", "planner")),
    ("L6 commands", ("draw", "info")),
    ("L6 checks", ("comparison", "numerics", "broken", "parity", "check")),
    ("L6 command line", ("__main__",)),
)
LEVEL = {module: level for level, (_, modules) in enumerate(LAYERS) for module in modules}

# What a module must not import, at any depth of its code: (modules, forbidden packages, why).
FORBIDDEN = (
    (("errors",), ("torch", "numpy", "longctx"), "errors are plain Python"),
    (
        ("shapes", "masks", "padding", "balance", "layout", "sequence"),
        ("triton", "torch.distributed", "deepspeed"),
        "L0 is torch only",
    ),
    (("kernels",), ("torch.distributed", "deepspeed"), "a kernel knows of no other process"),
    (PURE, ("torch.distributed", "deepspeed"), "plans are decided without a GPU"),
    (
        (
            "parallel",
            "flash",
            "functional",
            "attention",
            "rope",
            "initial",
            "offload",
            "tiled_mlp",
            "model",
            "hf_masks",
            "hf_attention",
            "huggingface",
            "hf_trainer",
        ),
        ("deepspeed", "wandb"),
        "the library works without the trainer",
    ),
)


def sources() -> dict[str, ast.Module]:
    """Module name below longctx -> its syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = ast.parse(path.read_text(), filename=str(path))
    return found


SOURCES = sources()


def imported(tree: ast.AST) -> set[str]:
    """Every module that the code may import, wherever the import stands; `from a import b` counts as a.b too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def key_of(module: str) -> str | None:
    """The entry of the layer table that a module below longctx belongs to."""
    parts = module.split(".")
    return next((k for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in LEVEL), None)


def is_below(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(p + ".") for p in parents)


def upward_imports(module: str, tree: ast.AST) -> list[str]:
    """Imports of `module` that do not go down."""
    mine = key_of(module)
    wrong = []
    for name in sorted(imported(tree)):
        theirs = key_of(name.removeprefix("longctx.")) if name.startswith("longctx.") else None
        if theirs and LEVEL[theirs] > LEVEL[mine]:
            wrong.append(f"{module} ({LAYERS[LEVEL[mine]][0]}) imports {name} ({LAYERS[LEVEL[theirs]][0]})")
    return wrong


@pytest.mark.parametrize("module", [m for m in SOURCES if m != "parallel"])
def test_every_module_has_a_layer_and_imports_go_down(module):
    assert key_of(module), f"give longctx.{module} a place in LAYERS, and in the README's reading order"
    assert upward_imports(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    "code",
    ["from longctx.trainer import Trainer", "from longctx import trainer", "def f():\n    import longctx.engine"],
    ids=["from", "package", "inside_a_function"],
)
def test_an_import_upwards_is_caught(code):
    assert len(upward_imports("masks", ast.parse(code))) >= 1


def test_the_packages_themselves_import_nothing():
    assert imported(SOURCES["parallel"]) == set()


def test_no_module_imports_itself_through_others():
    def edges(module: str) -> set[str]:
        names = {n.removeprefix("longctx.") for n in imported_at_load(SOURCES[module]) if n.startswith("longctx.")}
        return {n for n in names if n in SOURCES and n != module}

    graph = {module: edges(module) for module in SOURCES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def imported_at_load(tree: ast.Module) -> set[str]:
    """What the module imports when it is loaded: not inside functions, not for the type checker only."""
    todo: list[ast.AST] = list(tree.body)
    names = set()
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= imported(ast.Module([node], []))
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)
    return names


@pytest.mark.parametrize(("modules", "packages", "why"), FORBIDDEN, ids=lambda x: x if isinstance(x, str) else "")
def test_forbidden_imports(modules, packages, why):
    for module, tree in SOURCES.items():
        if is_below(module, modules):
            wrong = {n for n in imported(tree) if is_below(n, packages)}
            assert not wrong, f"longctx.{module} imports {sorted(wrong)}: {why}"


def test_no_module_is_named_utils():
    assert not [m for m in SOURCES if m.split(".")[-1] in {"utils", "util", "helpers", "common", "misc"}]


class TestPublicNames:
    def test_about_fifteen_and_all_of_them_load(self):
        assert 12 <= len(longctx.__all__) <= 20
        assert sorted(longctx.__all__) == sorted({*longctx._HOME, "__version__"})
        for name, home in longctx._HOME.items():
            assert getattr(longctx, name) is getattr(importlib.import_module(home), name)
        assert set(longctx.__all__) <= set(dir(longctx))

    def test_no_name_is_also_a_module(self):
        """Importing `longctx.x` would put the module where the public name was."""
        assert not set(longctx.__all__) & {module.split(".")[0] for module in SOURCES}

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="module 'longctx' has no attribute 'atention'"):
            longctx.atention  # noqa: B018

    def test_the_version_is_the_packages(self):
        assert f'version = "{longctx.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_importing_the_package_loads_nothing_heavy():
    """A fresh interpreter: no torch, DeepSpeed, Triton or wandb until a name is used, and never for the masks."""
    code = """
import json, sys, time
start = time.perf_counter()
import longctx
seconds = time.perf_counter() - start
heavy = ["torch", "triton", "deepspeed", "wandb", "transformers", "matplotlib"]
at_import = [m for m in heavy if m in sys.modules]
longctx.Causal
longctx.ParallelPlan
longctx.ParallelAttention
at_use = [m for m in heavy[2:] if m in sys.modules]
print(json.dumps([seconds, at_import, at_use]))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, at_import, at_use = json.loads(run.stdout)
    assert at_import == []
    assert at_use == []
    # Measured 1 ms; the bound is for a machine that is busy with something else.
    assert seconds < 1.0
