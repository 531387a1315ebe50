"""Which way imports point, read from the source: the core knows no domain, a domain knows the core and itself."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPING = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
DOMAINS = [name for name in MAPPING if name != "adaptsuite"]
FILES = sorted(path for folder in MAPPING.values() for path in (ROOT / folder).glob("*.py"))

# seconds each, so imported inside the function that needs them
HEAVY = {
    "accelerate",
    "captum",
    "fastapi",
    "highdicom",
    "jinja2",
    "matplotlib",
    "monai",
    "nibabel",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "open_clip",
    "optuna",
    "peft",
    "pydicom",
    "ray",
    "sklearn",
    "tensorboard",
    "timm",
    "torchaudio",
    "torchmetrics",
    "torchvision",
    "transformers",
}
# `adapt --help` reaches these
WITHOUT_TORCH = {
    "suite/__init__.py",
    "suite/cli.py",
    "suite/errors.py",
    "suite/manifest.py",
    "suite/plan.py",
    "suite/recipe.py",
    *(f"{MAPPING[domain]}/{name}.py" for domain in DOMAINS for name in ("__init__", "cli")),
}
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "misc", "base", "manager", "processor"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(tree):
    """(module, names, level, whether it runs on import of the file) of every import statement."""

    def visit(node, runs):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, (), 0, runs) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield child.module or "", tuple(alias.name for alias in child.names), child.level, runs
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from visit(ast.Module(child.orelse, []), runs)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, runs and not inside)

    return list(visit(tree, True))


def read(path):
    return imports(ast.parse(path.read_text(encoding="utf-8")))


def domains_of(module, names):
    """Domains that an import names, as `import adaptsuite.audio.data` or `from adaptsuite import audio`."""
    found = {domain for domain in DOMAINS if module == domain or module.startswith(domain + ".")}
    return found | ({f"adaptsuite.{name}" for name in names} & set(DOMAINS) if module == "adaptsuite" else set())


def test_the_reader_of_imports_sees_every_form():
    source = """
import a.b, c
from adaptsuite import audio as x
from . import d
if TYPE_CHECKING:
    import hidden
try:
    import e
except ImportError:
    e = None
class K:
    import f
def g():
    import h
    class L:
        import i
"""
    found = imports(ast.parse(source))
    assert [module for module, _, _, runs in found if runs] == ["a.b", "c", "adaptsuite", "", "e", "f"]
    assert [module for module, _, _, runs in found if not runs] == ["h", "i"]
    assert [level for *_, level, _ in found if level] == [1]
    assert domains_of("adaptsuite", ("audio", "host")) == {"adaptsuite.audio"}
    assert domains_of("adaptsuite.audio.data", ()) == {"adaptsuite.audio"} and not domains_of("adaptsuite.audios", ())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_to_the_core_and_to_the_own_domain_only(path):
    own = {package for package, folder in MAPPING.items() if path.parent == ROOT / folder}
    tops = {Path(folder).name for folder in MAPPING.values()}
    for module, names, level, _ in read(path):
        assert level == 0, (
            f"relative import of {module or names}: on disk '..' is not what the package calls its parent"
        )
        assert domains_of(module, names) <= own, f"{module} {names}"
        assert module.split(".")[0] not in tops, f"{module} is a folder of the clone, not a package"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_packages_are_imported_inside_functions(path):
    heavy = HEAVY | ({"torch", "numpy", "scipy"} if name_of(path) in WITHOUT_TORCH else set())
    assert not {module.split(".")[0] for module, *_, runs in read(path) if runs} & heavy


def test_files_without_torch_lead_to_no_file_with_torch():
    packages = {ROOT / folder: package for package, folder in MAPPING.items()}
    by_module = {f"{packages[path.parent]}.{path.stem}".removesuffix(".__init__"): path for path in FILES}
    reached, open_ends = set(), {path for path in FILES if name_of(path) in WITHOUT_TORCH}
    while open_ends:
        path = open_ends.pop()
        reached.add(path)
        for module, names, _, runs in read(path):
            targets = {module, *(f"{module}.{name}" for name in names)} if runs else ()
            open_ends |= {by_module[target] for target in targets if target in by_module} - reached
    heavy = {name_of(path): sorted({m.split(".")[0] for m, *_, runs in read(path) if runs}) for path in reached}
    assert not [name for name, modules in heavy.items() if "torch" in modules]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_named_after_what_it_holds(path):
    assert path.stem not in NAMES_THAT_SAY_NOTHING


@pytest.mark.parametrize("package", MAPPING)
def test_folders_are_flat(package):
    folder = ROOT / MAPPING[package]
    inner = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    assert inner <= {"recipes", "weights", "templates"}


def test_tests_stand_in_folders_named_as_the_code_and_none_is_a_package():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {*MAPPING.values(), "benchmarks"}
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not list((ROOT / "tests" / "benchmarks").glob("*test*.py"))  # pytest would collect them
