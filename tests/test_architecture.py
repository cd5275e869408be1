"""The house: imports point one way, each outside thing has its door, start-up is light."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

import hubaoti
from hubaoti import errors
from hubaoti.cli import COMMANDS, group

ROOT = Path(hubaoti.__file__).parent
BASE = ("escape", "errors", "flags", "progress", "front_matter", "folder_trees", "disk", "settings")
STORED = {*BASE, "artifact", "host"}
OPENED = {*STORED, "program", "mirror", "runtime"}
# What each room may import of the others; the base's files each see those before them.
ROOMS = {
    **{name: {*BASE[:at]} for at, name in enumerate(BASE)},
    "artifact": {*BASE},
    "host": {*BASE, "artifact"},
    "program": {*STORED},
    "mirror": {*STORED},
    "runtime": {*STORED, "program", "mirror"},
    "compiler": {*STORED, "program", "runtime"},
    "attachment": {*STORED, "program", "runtime"},
    "hub": {*STORED, "mirror"},
    "api": {*OPENED, "compiler", "attachment", "hub"},
    "engines": {*OPENED, "compiler", "attachment", "hub", "api"},
    "spaces": {*OPENED, "attachment", "hub", "api"},
    "server": {"errors", "front_matter", "folder_trees", "disk", "artifact"},
    "cli": {*STORED, "mirror", "hub", "api", "engines", "spaces", "server"},
    "": {"api", "artifact", "attachment", "engines", "errors", "mirror"},
}
# Who opens which door; a file's room, or its path where only that file may.
DOORS = {
    "torch": {
        "program",
        "compiler",
        "runtime",
        "attachment",
        "engines",
        "spaces/deferred.py",
        "spaces/devices.py",
        "spaces/worker.py",
        "spaces/unsigned/load.py",
        "spaces/unsigned/region.py",
        "spaces/unsigned/first_open.py",
        "spaces/unsigned/outcomes.py",
    },
    "transformers": {"program", "compiler", "engines"},
    "huggingface_hub": {
        "hub/door.py",
        "hub/client.py",
        "hub/errors.py",
        "hub/retry.py",
        "hub/bounds.py",
        "server/upstream.py",
    },
    "model_signing": {"hub/signing.py"},
    "sigstore_models": {"hub/signing.py"},
    "cryptography": {"hub/keys.py", "hub/signing.py"},
    "tenacity": {"hub/retry.py", "hub/bounds.py"},
    "yaml": {"front_matter"},
    "sqlite3": {"mirror", "server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "click": {"cli"},
    "rich": {"cli"},
    "safetensors": {"compiler", "runtime", "engines"},
    "torchao": {"runtime/quantize.py"},
    "sympy": {"compiler"},
    "tokenizers": {"program", "compiler", "runtime"},
    "kernels": {"runtime", "compiler", "spaces"},
    "ray": {"engines"},
    "pynvml": {"host"},
    "archspec": {"host"},
}
# Types and values of torch in signatures: of the verbs, and of what prints them.
LAZY = {
    ("torch", "api/attaching.py"),
    ("torch", "api/building.py"),
    ("torch", "api/compiling.py"),
    ("torch", "api/texts.py"),
    ("torch", "api/verifying.py"),
    ("torch", "cli/run.py"),
    ("torch", "spaces/__init__.py"),
}


@dataclass(frozen=True)
class Import:
    """One import of one of our files."""

    file: str
    module: str
    lazy: bool

    @property
    def room(self) -> str:
        first = Path(self.file).parts[0].removesuffix(".py")
        return "" if first == "__init__" else first


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imports_of(file: Path) -> Iterator[Import]:
    """Every import, also those in functions and under TYPE_CHECKING, which are `lazy`."""
    tree = ast.parse(file.read_text())
    name = file.relative_to(ROOT).as_posix()
    at_start = {id(node) for node in started(tree)}
    for node in ast.walk(tree):
        lazy = id(node) not in at_start
        if isinstance(node, ast.Import):
            yield from (Import(name, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            assert node.module is not None
            whole = node.module == "hubaoti"
            for alias in node.names if whole else node.names[:1]:
                yield Import(name, f"hubaoti.{alias.name}" if whole else node.module, lazy)


def started(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs when a module is imported."""
    waiting: list[ast.AST] = [*tree.body]
    while waiting:
        node = waiting.pop()
        yield node
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not checking and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def all_imports() -> list[Import]:
    return [each for file in files() for each in imports_of(file)]


def test_every_file_is_in_a_room() -> None:
    rooms = {Import(file.relative_to(ROOT).as_posix(), "", False).room for file in files()}
    assert rooms <= ROOMS.keys()
    assert rooms == ROOMS.keys()


def test_imports_point_one_way() -> None:
    wrong = []
    for each in all_imports():
        if each.module.split(".")[0] == "hubaoti":
            wanted = each.module.removeprefix("hubaoti").lstrip(".").split(".")[0]
            inside = {each.room, "", "__version__"}
            if wanted not in ROOMS[each.room] | inside:
                wrong.append(f"{each.file} imports {each.module}")
    assert wrong == []


def test_each_outside_thing_is_opened_behind_its_door() -> None:
    wrong = []
    for each in all_imports():
        thing = each.module.split(".")[0]
        allowed = DOORS.get(thing, {each.room})
        lazy = each.lazy and (thing, each.file) in LAZY
        if not lazy and each.room not in allowed and each.file not in allowed:
            wrong.append(f"{each.file} imports {each.module}")
    assert wrong == []


@pytest.mark.parametrize("thing", ["torch", "transformers", "huggingface_hub", "sqlite3", "click"])
def test_the_doors_are_in_use(thing: str) -> None:
    """Else the test above would hold of a house that nobody lives in."""
    opened = {each.file for each in all_imports() if each.module.split(".")[0] == thing}
    assert opened


def test_only_the_settings_read_the_environment() -> None:
    readers = set()
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            named = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}
            imported = isinstance(node, ast.ImportFrom) and node.module == "os"
            if named or (imported and {a.name for a in node.names} & {"environ", "getenv"}):
                readers.add(file.relative_to(ROOT).as_posix())
    assert readers == {"settings.py"}


def test_one_file_writes_to_the_terminal() -> None:
    """It escapes what it writes; `print` is forbidden everywhere."""
    writers = {"click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"}
    found = {
        file.relative_to(ROOT).as_posix()
        for file in files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in writers
    }
    assert found == {"cli/output.py"}


def test_a_module_is_one_idea_of_at_most_400_lines() -> None:
    long = [file.name for file in files() if len(file.read_text().splitlines()) > 400]
    assert long == []


LIGHT = """
import json, sys
try:
    {code}
except SystemExit as end:
    assert not end.code, end.code
json.dump(sorted(sys.modules), open({out!r}, "w"))
"""


def modules_after(code: str, tmp_path: Path) -> set[str]:
    """The top-level modules that a fresh process has after some code."""
    out = tmp_path / "modules.json"
    program = LIGHT.format(code=code, out=str(out))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in json.loads(out.read_text())}


@pytest.mark.parametrize(
    "code",
    [
        "import hubaoti",
        "import hubaoti.api",
        "from hubaoti.cli import main; main(['--help'])",
        "from hubaoti.cli import main; main(['--version'])",
        "from hubaoti.cli import main; main(['compile', '--help'])",
        "from hubaoti.cli import main; main(['run', '--help'])",
        "from hubaoti.cli import main; main(['doctor'])",
        "from hubaoti.cli import main; main(['mirror', 'ls'])",
        "from hubaoti.cli import main; main(['verify'])",
        "from hubaoti.cli import main; main(['trust', 'ls'])",
    ],
)
def test_it_starts_without_torch(code: str, tmp_path: Path) -> None:
    heavy = {"torch", "transformers", "numpy", "tokenizers", "kernels", "starlette", "uvicorn"}
    heavy |= {"model_signing", "cryptography"}
    loaded = modules_after(code, tmp_path)
    assert loaded & heavy == set()
    assert "huggingface_hub" not in loaded


def every_command(root: click.Command, path: tuple[str, ...] = ()) -> Iterator[click.Command]:
    yield root
    if isinstance(root, click.Group):
        with click.Context(root) as context:
            for name in root.list_commands(context):
                command = root.get_command(context, name)
                assert command is not None
                yield from every_command(command, (*path, name))


def test_every_command_says_what_it_does() -> None:
    commands = [*every_command(group)]
    assert len(commands) > len(COMMANDS)
    silent = [
        each.name
        for each in commands
        if not each.help or not each.help.rstrip().endswith((".", ":"))
    ]
    assert silent == []


def test_every_option_that_is_not_plain_has_help() -> None:
    plain = {"--host"}
    silent = [
        f"{command.name} {option.opts[0]}"
        for command in every_command(group)
        for option in command.params
        if isinstance(option, click.Option) and not option.help and option.opts[0] not in plain
    ]
    assert silent == []


def error_classes() -> list[type[errors.HubaotiError]]:
    found = [item for _, item in inspect.getmembers(errors, inspect.isclass)]
    return [each for each in found if issubclass(each, errors.HubaotiError)]


def test_every_error_has_an_exit_code_of_its_own() -> None:
    own = [cls for cls in error_classes() if "exit_code" in vars(cls)]
    codes = [cls.exit_code for cls in own]
    assert len(own) == len(error_classes())
    assert len({*codes}) == len(codes)
    assert errors.BadRequest.exit_code == 2
    assert not {0, 126, 127, 128, 130} & {*codes}  # the shell's


def test_every_error_is_raised_on_purpose_somewhere() -> None:
    text = "".join(file.read_text() for file in files() if file.name != "errors.py")
    unused = [cls.__name__ for cls in error_classes() if cls.__name__ not in text]
    assert unused == []


def drawn() -> set[str]:
    """The paths in the tree of docs/house.md, by how far each line is indented."""
    text = (ROOT.parent / "docs/house.md").read_text()
    found, above = set(), dict[int, str]()
    for line in text.splitlines():
        if name := re.match(r"    ( +)([a-z_]+(?:\.py|/)) ", f"{line} "):
            depth = len(name[1])
            path = above.get(depth - 2, "") + name[2]
            above[depth] = path
            found.add(path)
    return found


def defines(file: Path) -> bool:
    """Whether a file has code of its own."""
    return any(
        isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in ast.parse(file.read_text()).body
    )


def test_the_house_s_tree_names_every_module() -> None:
    there = {file.relative_to(ROOT).as_posix() for file in files()}
    rooms = {f"{Path(path).parent}/" for path in there} - {"./"}
    modules = {path for path in there if Path(path).name != "__init__.py" or defines(ROOT / path)}
    assert drawn() == modules | rooms


def test_the_readme_names_every_command() -> None:
    readme = (ROOT.parent / "README.md").read_text()
    assert [name for name in COMMANDS if f"hubaoti {name}" not in readme] == []
