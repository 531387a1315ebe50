"""What is built and installed: the mapping of folders, the wheel's content, and how fast the command answers."""

import ast
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAPPING = PROJECT["tool"]["setuptools"]["package-dir"]
DATA_FOLDERS = ("recipes", "weights", "templates")


def python(code):
    """Standard output of a fresh interpreter that can import adaptsuite, installed or not."""
    start = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, cwd=ROOT.anchor)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_folder_with_an_init_is_in_the_mapping_and_in_the_packages():
    # a folder missing from `packages` works in editable mode and is silently absent from the wheel
    outside = {"tests", "notebooks", "build", "dist"}
    found = {
        path.parent.relative_to(ROOT).as_posix()
        for path in ROOT.glob("*/**/__init__.py")
        if path.relative_to(ROOT).parts[0] not in outside and not path.relative_to(ROOT).parts[0].startswith(".")
    }
    assert found == set(MAPPING.values())
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == set(MAPPING)
    assert all((ROOT / folder / "py.typed").is_file() for folder in found)


def test_the_version_is_a_literal():
    tree = ast.parse((ROOT / "suite" / "__init__.py").read_text(encoding="utf-8"))
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["__version__"]
    ]
    assert ast.literal_eval(value).count(".") == 2
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "adaptsuite.__version__"}


def test_every_command_of_the_project_exists():
    commands = PROJECT["project"]["scripts"]
    assert "adapt" in commands
    for target in commands.values():
        module, name = target.split(":")
        assert python(f"import {module}; print(callable({module}.{name}))") == "True\n"


def test_every_public_name_is_there_and_the_package_alone_imports_no_torch():
    code = "import adaptsuite as a; print('torch' in sys.modules); print(all(hasattr(a, n) for n in a.__all__))"
    assert python(code) == "False\nTrue\n"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["audio", "--help"], ["audio", "train", "--help"], ["vision", "inspect", "--help"]],
)
def test_help_and_version_import_nothing_heavy(arguments):
    code = f"""
from adaptsuite.cli import main
sys.argv = ["adapt", *{arguments!r}]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
print("code", code or 0)
print("heavy", sorted({{"torch", "numpy", "transformers", "timm", "monai", "sklearn"}} & set(sys.modules)))
"""
    lines = python(code).splitlines()
    assert lines[-2:] == ["code 0", "heavy []"] and len(lines) > 2


def test_pins_are_versions_and_cover_what_the_project_names():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split():
        name, version = line.split("==")
        assert version[0].isdigit() and "/" not in line
        pins[normal(name)] = version
    needed = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["test"]]
    from packaging.requirements import Requirement

    for requirement in map(Requirement, needed):
        assert requirement.specifier.contains(pins[normal(requirement.name)]), requirement


def normal(name):
    return name.lower().replace("_", "-").replace(".", "-")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist and the wheel that was built from it, as `python -m build` makes them."""
    pytest.importorskip("build")
    if int(pytest.importorskip("setuptools").__version__.split(".")[0]) < 77:
        pytest.skip("setuptools 77 or newer is needed to build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in tracked():
        target = source / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / path).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-o", out, source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def tracked():
    """Files of the working tree that git does not ignore; without git, the folders that matter."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    found = [path for folder in (*MAPPING.values(), "tests", ".ci") for path in (ROOT / folder).rglob("*")]
    kept = [path for path in (*found, *ROOT.iterdir()) if path.is_file() and "__pycache__" not in path.parts]
    return [path.relative_to(ROOT) for path in kept]


@pytest.mark.slow
def test_the_wheel_built_from_the_sdist_holds_the_packages_with_their_data_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in inside} == {"adaptsuite"}
    expected = set()
    for package, folder in MAPPING.items():
        prefix = package.replace(".", "/")
        for path in tracked():
            if path.parent == Path(folder) and path.suffix in (".py", ".typed"):
                expected.add(f"{prefix}/{path.name}")
            elif path.parent.parent == Path(folder) and path.parent.name in DATA_FOLDERS:
                if path.parent.name != "recipes" or path.suffix == ".toml":
                    expected.add(f"{prefix}/{path.parent.name}/{path.name}")
    assert {name for name in inside if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in inside)


@pytest.mark.slow
def test_the_sdist_holds_what_a_developer_needs(built):
    (archive,) = built.glob("*.tar.gz")
    inside = {name.split("/", 1)[1] for name in tarfile.open(archive).getnames() if "/" in name}
    wanted = ("Makefile", "constraints.txt", "LICENSE", "README.md", ".ci/run", "tests/conftest.py", "suite/errors.py")
    assert set(wanted) <= inside


@pytest.mark.slow
def test_the_installed_wheel_answers_and_leaves_the_users_own_names_alone(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", tmp_path / "site", wheel],
        check=True,
    )
    assert {path.name.split("-")[0] for path in (tmp_path / "site").iterdir()} <= {"adaptsuite", "bin"}
    (tmp_path / "audio.py").write_text("mine = True\n")
    code = "import audio, adaptsuite.audio; assert audio.mine; print(adaptsuite.audio.__file__)\n"
    code += "from adaptsuite.cli import main; import sys; sys.argv = ['adapt', '--help']; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout.splitlines()[0] and "audio" in done.stdout
