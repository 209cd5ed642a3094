"""The house plan, enforced over the tree: what may know what, one importer a concept, what starts without what."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("fedllm", "client", "server", "simulations")
FLOWER_AND_HYDRA = ("flwr", "flwr_datasets", "hydra", "omegaconf", "ray")
COMMAND_LINE = ("fedllm.cli",)  # entry points: may import anything
API = "fedllm.api"  # another, for programs: `import fedllm` imports it when one of its names is asked for
ENTRY_POINTS = (*COMMAND_LINE, API)

STOCK = (  # what others do, to compare with
    "simulations.benchmarks.step", "simulations.benchmarks.batch_memory", "simulations.benchmarks.probe",
    "simulations.benchmarks.bench", "simulations.benchmarks.quantise", "simulations.benchmarks.gpu",
    "simulations.benchmarks.serving", "simulations.benchmarks.peers", "simulations.benchmarks.stock_flower",
    "simulations.benchmarks.stock_pfl",
)  # fmt: skip

# Third party -> the only modules (or packages, with a dot at the end) that may import it. One concept, one file.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "torch": (
        "fedllm.training.",
        "fedllm.audit.",
        "fedllm.release.",
        "simulations.demo.pretrain",
        "simulations.benchmarks.methods",
        *STOCK,
    ),
    "transformers": ("fedllm.training.", "fedllm.audit.", "fedllm.release.", "simulations.demo.pretrain", *STOCK),
    "peft": ("fedllm.training.", "fedllm.audit.", "fedllm.release.", *STOCK),
    "bitsandbytes": ("fedllm.training.quantised",),
    "opacus": ("fedllm.training.engine", "fedllm.audit.prv", *STOCK),
    "datasets": ("fedllm.training.data", "simulations."),
    "sqlite3": ("fedllm.privacy.ledger",),
    "cryptography": ("fedllm.crypto.",),
    "securesystemslib": ("fedllm.crypto.",),
    "yaml": ("fedllm.settings_file", *COMMAND_LINE),
    "dp_accounting": ("fedllm.privacy.accounting",),
    "scipy": (
        "fedllm.privacy.one_run",
        "fedllm.privacy.mixture",
        "fedllm.audit.membership",
        "simulations.benchmarks.scale",
    ),
    "mpmath": ("fedllm.privacy.distributed_noise",),
    "safetensors": ("fedllm.training.", "fedllm.release.", "server.checkpoint"),
    "matplotlib": ("fedllm.audit.", "fedllm.release."),
    "jinja2": ("fedllm.audit.", "fedllm.release."),
    "fastapi": ("fedllm.release.serve",),
    "uvicorn": ("fedllm.release.serve",),
    "starlette": ("fedllm.release.serve",),
    "sacrebleu": ("fedllm.release.evaluate",),
    "typer": (*COMMAND_LINE, "simulations.benchmarks."),
    "rich": (*COMMAND_LINE, "simulations.benchmarks."),
    "hydra": COMMAND_LINE,
    "omegaconf": COMMAND_LINE,
    "flwr": ("client.", "server.", "simulations."),
    "flwr_datasets": ("simulations.",),
    "ray": ("simulations.ray_grid",),
    "grpc": ("client.", "server."),
    "google": ("fedllm.protocol.",),  # protobuf
    "pickle": (),
    "marshal": (),
    "shelve": (),
}

# Each layer may import itself (by the order of its files) and the layers before it.
LAYERS: list[tuple[str, ...]] = [
    ("fedllm.errors",),
    (
        "fedllm.shown",
        "fedllm.canonical",
        "fedllm.adapter_vector",
        "fedllm.files",
        "fedllm.processes",
        "fedllm.settings_file",
        "fedllm.values",
    ),
    ("fedllm.crypto",),
    ("fedllm.privacy",),
    ("fedllm.config",),
    ("fedllm.plan",),
    ("fedllm.protocol",),
    ("fedllm.secagg",),
    ("fedllm.ops",),
    ("fedllm.training",),
    ("fedllm.audit",),
    ("fedllm.release",),
]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, ast.Module]:
    """Return the syntax tree of every product module by its name."""
    files = [file for package in PRODUCT for file in sorted((ROOT / package).rglob("*.py"))]
    return {module_of(file): ast.parse(file.read_text("utf-8"), str(file)) for file in files}


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Yield the full dotted name of everything that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where an arrow points"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def arrows() -> list[tuple[str, str]]:
    """Return every (module, imported name), but for that of the API, which `import fedllm` leaves for later."""
    found = [(module, name) for module, tree in sources().items() for name in imports_of(tree)]
    return [(module, name) for module, name in found if not (module == "fedllm" and within(name, [API]))]


def within(name: str, places: Iterable[str]) -> bool:
    """Whether a dotted name is one of `places` or lies inside one."""
    return any(name == place.rstrip(".") or name.startswith(place.rstrip(".") + ".") for place in places)


def expect_none(forbidden: list[tuple[str, str]]) -> None:
    assert not forbidden, "\n".join(f"{module} imports {name}" for module, name in forbidden)


def test_the_library_knows_neither_flower_nor_hydra_nor_its_users() -> None:
    forbidden = (*FLOWER_AND_HYDRA, "client", "server", "simulations", "conf", "tests")
    expect_none([
        (module, name)
        for module, name in arrows()
        if within(module, ["fedllm"]) and not within(module, ENTRY_POINTS) and within(name, forbidden)
    ])  # fmt: skip


def test_nobody_imports_the_command_line_or_the_tests() -> None:
    expect_none([
        (module, name)
        for module, name in arrows()
        if not within(module, ENTRY_POINTS) and within(name, [*ENTRY_POINTS, "tests", "docs", "examples"])
    ])  # fmt: skip


@pytest.mark.parametrize("concept", ONLY_IN)
def test_a_third_party_concept_is_imported_in_its_one_place(concept: str) -> None:
    expect_none([
        (module, name) for module, name in arrows() if within(name, [concept]) and not within(module, ONLY_IN[concept])
    ])  # fmt: skip


@pytest.mark.parametrize("importer", ["opacus", "datasets", "sqlite3", "dp_accounting", "torch", "peft", "flwr"])
def test_a_concept_is_still_imported_where_these_rules_say(importer: str) -> None:
    assert any(within(name, [importer]) for _, name in arrows()), "the rule above would hold for nothing"


@pytest.mark.parametrize(
    ("module", "others"),
    [("client", ("server", "simulations")), ("server", ("client", "simulations")), ("simulations.demo", ("fedllm",))],
)
def test_the_two_ends_do_not_know_each_other(module: str, others: tuple[str, ...]) -> None:
    expect_none([(where, name) for where, name in arrows() if within(where, [module]) and within(name, others)])


def layer_of(name: str) -> int | None:
    return next((index for index, layer in enumerate(LAYERS) if within(name, layer)), None)


def test_lower_layers_never_import_higher_ones() -> None:
    expect_none([
        (module, name)
        for module, name in arrows()
        if (low := layer_of(module)) is not None and (high := layer_of(name)) is not None and high > low
    ])  # fmt: skip


def test_every_module_of_the_library_has_a_layer() -> None:
    library = [module for module in sources() if module.startswith("fedllm.") and not within(module, ENTRY_POINTS)]
    assert [module for module in library if layer_of(module) is None] == []
    assert library


def test_no_two_modules_import_each_other() -> None:
    known = set(sources())
    graph = {
        module: {
            found for m, name in arrows() if m == module for found in (name, name.rpartition(".")[0]) if found in known
        }
        for module in known
    }
    for start in known:
        seen: set[str] = set()
        pending = [found for found in graph[start] if found != start]
        while pending:
            module = pending.pop()
            assert module != start, f"{start} imports itself by way of others"
            if module not in seen:
                seen.add(module)
                pending += graph[module]


def entry_points() -> set[str]:
    """Return modules that a user starts: those in the project's scripts, and those that can be run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    started = {**project["project"]["scripts"], **project["tool"]["flwr"]["app"]["components"]}
    named = {target.partition(":")[0] for target in started.values()}
    runnable = {
        module
        for module, tree in sources().items()
        for node in tree.body
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    }
    return named | runnable | {API}


def test_every_module_is_used_by_another_or_started_by_a_user() -> None:
    used = {found for module, name in arrows() for found in (name, name.rpartition(".")[0]) if found != module}
    orphans = []
    for module, tree in sources().items():
        is_package = (ROOT / Path(*module.split(".")) / "__init__.py").exists()
        if is_package and any(other.startswith(module + ".") for other in sources()):
            continue  # a package is used by way of its modules
        if module not in used and module not in entry_points() and tree.body:
            orphans.append(module)
    assert not orphans


def test_every_package_of_the_product_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    included = project["tool"]["setuptools"]["packages"]["find"]["include"]
    for package in PRODUCT:
        assert f"{package}*" in included
        for folder in {file.parent for file in (ROOT / package).rglob("*.py")}:
            assert (folder / "__init__.py").exists(), f"{folder.relative_to(ROOT)} is not a package"


@pytest.mark.parametrize("package", PRODUCT)
def test_assert_is_for_tests(package: str) -> None:
    found = [
        f"{module}, line {node.lineno}"
        for module, tree in sources().items()
        if within(module, [package])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert not found  # python -O would remove it


def test_no_handler_catches_everything_unnamed() -> None:
    found = [
        f"{module}, line {node.lineno}"
        for module, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not found


def test_an_import_defines_and_does_nothing() -> None:
    """What a library prints or logs, and what a process is, is set where it is needed, and by who asks for it."""
    makes = ("fedllm.settings_file", "fedllm.protocol.link_pb2")  # the loader of settings; what protobuf generates
    found = [
        f"{module}, line {node.lineno}"
        for module, tree in sources().items()
        if not within(module, [*COMMAND_LINE, *makes])
        for node in tree.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    assert not found


def test_no_code_is_made_from_text() -> None:
    found = [
        f"{module}, line {node.lineno}"
        for module, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("eval", "exec", "compile")
    ]
    assert not found


def test_every_error_that_is_raised_on_purpose_is_in_the_tree_of_errors() -> None:
    tree = sources()["fedllm.errors"]
    drawn = ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            assert node.name in drawn, f"{node.name} is missing from the drawing at the top"
    own = [  # but for those whose name says that they do not leave their module
        f"{module}, line {node.lineno}: {node.name}"
        for module, module_tree in sources().items()
        if module != "fedllm.errors"
        for node in ast.walk(module_tree)
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any(ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases)
    ]
    assert not own


def loaded_by(code: str) -> set[str]:
    """Return the top-level names of what is imported when `code` has run in a process of its own."""
    show = "import sys; print('loaded:', *sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.rpartition("loaded:")[2].split())


HEAVY = {"torch", "transformers", "peft", "opacus", "datasets", "pandas", "pyarrow", "scipy", "matplotlib", "sqlite3",
         "dp_accounting", "safetensors", "tokenizers", "sklearn"}  # fmt: skip


def test_only_a_base_in_four_bits_loads_bitsandbytes() -> None:
    """PEFT would, wherever it is installed: two seconds in every process."""
    code = "import fedllm.training.adapter, peft.import_utils as peft; assert peft.is_bnb_available()"
    assert "bitsandbytes" not in loaded_by(code)


@pytest.mark.parametrize("module", ["server.daemon", "client.relay"])
def test_what_only_carries_bytes_loads_neither_model_nor_flower(module: str) -> None:
    """The daemon and the relay: small, and without what could run anything."""
    loaded = loaded_by(f"import {module}")
    assert "grpc" in loaded
    assert not loaded & (HEAVY | {"flwr", "ray", "hydra"})


def test_a_sites_process_knows_no_flower_and_no_tables() -> None:
    """Nothing that the server sends is run there: what could run it is not even loaded. Tables take 100 MB."""
    loaded = loaded_by("import client.service, client.link, client.office, client.site")
    assert {"grpc", "torch"} <= loaded
    assert not loaded & {"flwr", "ray", "hydra", "flwr_datasets", "datasets", "pandas", "pyarrow"}


def test_only_the_simulations_app_at_the_clients_end_knows_flower() -> None:
    users = {module for module, name in arrows() if within(module, ["client"]) and within(name, ["flwr"])}
    assert users == {"client.app"}
    expect_none([
        (module, name) for module, name in arrows() if within(name, ["client.app"]) and within(module, ["client"])
    ])  # fmt: skip


def test_the_round_loop_loads_no_flower() -> None:
    """It reaches sites by a `Channel`: any Grid, any transport, and none in tests of its own."""
    loaded = loaded_by("import server.rounds")
    assert {"server", "numpy"} <= loaded
    assert not loaded & {"flwr", "ray", "grpc", "torch"}
    names = ("rounds", "secagg_server", "aggregate", "ledger_heads", "checkpoint", "run_record", "run")
    deciding = [f"server.{name}" for name in names]
    assert set(deciding) <= set(sources())
    expect_none([(module, name) for module, name in arrows() if module in deciding and within(name, ["flwr"])])


def test_the_daemon_knows_no_flower_by_any_way() -> None:
    known, pending, seen = set(sources()), ["server.daemon"], set[str]()
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending += [found for m, name in arrows() if m == module for found in (name, name.rpartition(".")[0])
                        if found in known]  # fmt: skip
    assert "server.federation" in seen
    expect_none([
        (module, name) for module, name in arrows() if module in seen and within(name, ["flwr", "ray", "torch"])
    ])  # fmt: skip


@pytest.mark.parametrize("module", ["client.app", "fedllm.protocol.messages"])
def test_what_carries_messages_starts_without_any_heavy_library(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert module.partition(".")[0] in loaded
    assert not loaded & HEAVY


def test_the_package_is_imported_in_no_time_and_its_names_when_they_are_asked_for() -> None:
    """Before torch, NumPy, Pydantic and Hydra, which take seconds, there are the standard library and the errors."""
    loaded = loaded_by("import fedllm, sys; assert {n for n in sys.modules if 'fedllm.' in n} == {'fedllm.errors'}")
    assert loaded <= {"fedllm", *sys.stdlib_module_names, *loaded_by("")}
    loaded = loaded_by("import fedllm; fedllm.simulate; fedllm.Run")
    assert not loaded & (HEAVY | {"numpy", "pydantic", "hydra", "flwr"})


@pytest.mark.parametrize("flag", ["--help", "version"])
def test_the_command_line_starts_without_any_heavy_library(flag: str) -> None:
    code = f"""
import sys
sys.argv = ["fedllm", {flag!r}]
from fedllm.cli.main import main
try:
    main()
except SystemExit as stop:
    code = stop.code
print("loaded:", *sorted({{name.partition('.')[0] for name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "flwr", "hydra", "datasets", "matplotlib", "opacus"}


def test_the_rules_above_see_an_import_anywhere() -> None:
    tree = ast.parse(
        "import a.b\nfrom c import d, e\ndef f():\n    import g\n    if f:\n        from h.i import j as k\n"
    )
    assert sorted(imports_of(tree)) == ["a.b", "c.d", "c.e", "g", "h.i.j"]
    assert within("torch.nn", ["torch"])
    assert within("fedllm.training", ["fedllm.training."])
    assert not within("torchvision", ["torch"])
