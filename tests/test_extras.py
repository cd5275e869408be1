"""Extras: what a plain installation does without them, and how it asks for what it lacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bundles import make_bundle
from commands import Done, environment_of
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn

import hubaoti
from hubaoti import api
from hubaoti.artifact.requirements import series
from hubaoti.cli import COMMANDS
from hubaoti.errors import MissingDependency
from hubaoti.host import extras
from hubaoti.host.extras import EXTRAS, SUPPORTED, format_install, is_supported, join_names, require
from hubaoti.host.probe import probe_host
from hubaoti.settings import Settings

ROOT = Path(hubaoti.__file__).parent.parent
BROUGHT = ("torch", "transformers", "tokenizers", "sentence_transformers", "diffusers", "nvidia")
BROUGHT += ("model_signing", "pyopenssl", "OpenSSL")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REFUSED = [
    ("torch", "2.10.1"),
    ("torch", "2.16.0+cpu"),
    ("transformers", "5.14.3"),
    ("transformers", "5.25.0"),
    ("transformers", "4.57.1"),
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install hubaoti` alone would bring: this Python's packages but for the extras'."""
    folder = tmp_path_factory.mktemp("bare")
    for place in {Path(each) for each in sys.path if Path(each).name == "site-packages"}:
        for entry in place.iterdir():
            if not entry.name.startswith(BROUGHT) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def python(bare: Path, settings: Settings, *words: object) -> Done:
    """Run a plain installation's Python to its end; a traceback is never an answer."""
    env = environment_of(settings) | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(bare)])}
    done = subprocess.run(
        [sys.executable, "-S", *map(str, words)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    for word in ("Traceback", "error: unexpected"):
        assert word not in done.stdout + done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def plain(bare: Path, settings: Settings, *words: object) -> Done:
    """Run a command of a plain installation."""
    return python(bare, settings, "-m", "hubaoti.cli", *words)


def test_a_plain_installation_starts_every_command(bare: Path, settings: Settings) -> None:
    for command in COMMANDS:
        assert plain(bare, settings, command, "--help").code == 0
    assert "not installed" in plain(bare, settings, "doctor").out
    assert plain(bare, settings, "mirror", "ls").code == 0
    assert plain(bare, settings, "trust", "ls").code == 0


def test_a_plain_installation_publishes_and_fetches_what_is_named(
    bare: Path, tmp_path: Path, repo: str, settings: Settings
) -> None:
    host = probe_host(settings)
    target = {"device": "cpu", "os": host.os, "level": host.level, "torch": "2.13.0+cpu"}
    place = f"float32-sdpa/torch2.13-cpu-{host.level}-{host.os}"
    made = make_bundle(tmp_path / "bundle", target=target)
    assert plain(bare, settings, "push", made.path, repo, "--tag", "v1", "--as-is").code == 0
    chosen = plain(bare, settings, "pull", f"{repo}@v1", "--trust")
    assert chosen.code == 3
    assert "needs torch 2.13.0+cpu; here is no torch: install torch 2.13" in chosen.err
    both = f'pip install "torch==2.13.*", then {format_install("run")};'
    assert f"hint: install the one that it was built for: {both}" in chosen.err
    assert f"hubaoti pull {repo}@v1 --path {place}" in chosen.err
    named = plain(bare, settings, "pull", f"{repo}@v1", "--trust", "--path", place)
    assert named.code == 0
    assert "built for torch 2.13.0+cpu, here is no torch" in named.out
    assert 'pip install "torch==2.13.0"' in named.out
    assert made.manifest.digest[:12] in plain(bare, settings, "mirror", "ls").out


def test_a_plain_installation_checks_a_bundle_s_bytes(
    bare: Path, tmp_path: Path, repo: str, settings: Settings
) -> None:
    made = make_bundle(tmp_path / "bundle")
    (made.path / "golden.safetensors").write_bytes(b"golded" * 100)
    done = plain(bare, settings, "push", made.path, repo, "--as-is")
    assert done.code == 10
    assert "golden.safetensors" in done.err


@pytest.mark.parametrize(
    ("words", "missing", "extra"),
    [
        (("compile", "acme/tiny", "-o", "out"), "torch and transformers", "compile"),
        (("compile", "acme/tiny", "--explain"), "torch and transformers", "compile"),
        (("run", "acme/tiny", "--model", "x", "--text", "y"), "torch and tokenizers", "run"),
        (("trust", "keygen", "acme"), "model-signing and pyopenssl", "sign"),
        (
            ("run", "acme/tiny", "--model", "x", "--text", "y", "--eager"),
            "torch, transformers and tokenizers",
            "compile,run",
        ),
        (
            ("run", "--model", "x", "--prompt", "y"),
            "torch, transformers and tokenizers",
            "compile,run",
        ),
    ],
)
def test_a_command_that_needs_an_extra_names_it(
    words: tuple[str, ...], missing: str, extra: str, bare: Path, settings: Settings
) -> None:
    done = plain(bare, settings, *words)
    assert done.code == 26
    assert f"needs {missing}, which are not installed" in done.err
    assert f"hint: {format_install(*extra.split(','))}\n" in done.err


@pytest.mark.parametrize(
    ("verb", "extra"),
    [
        ("capture(None)", "compile"),
        ("compile('x')", "compile"),
        ("explain('x')", "compile"),
        ("attach(None, 'acme/tiny')", "run"),
        ("load(None, 'x')", "run"),
        ("eager('x', ['y'])", "compile,run"),
        ("LightweightEngine()", "compile,run"),
        ("spaces.load(None, 'acme/tiny')", "run"),
    ],
)
def test_a_verb_that_needs_an_extra_names_it(
    verb: str, extra: str, bare: Path, settings: Settings
) -> None:
    program = (
        "import hubaoti\nfrom hubaoti.errors import MissingDependency\n"
        f"try: hubaoti.{verb}\nexcept MissingDependency as why: print(why.hint)"
    )
    assert python(bare, settings, "-c", program).out == f"{format_install(*extra.split(','))}\n"


VERBS: dict[str, Callable[[Settings], Any]] = {
    "compile": lambda settings: hubaoti.compile("acme/tiny", settings=settings),
    "explain": lambda settings: hubaoti.explain("acme/tiny", settings=settings),
    "capture": lambda settings: hubaoti.capture(nn.Identity()),
    "eager": lambda settings: hubaoti.eager("acme/tiny", ["x"], settings=settings),
    "an engine": lambda settings: require("an engine", "compile", "run"),
}
OPENS: dict[str, Callable[[Settings], Any]] = {
    "run": lambda settings: api.run("acme/tiny", "x", ["x"], settings=settings),
    "attach": lambda settings: hubaoti.attach(nn.Identity(), "acme/tiny", settings=settings),
    "spaces.load": lambda settings: hubaoti.spaces.load(
        nn.Identity(), "acme/tiny", settings=settings
    ),
}


@pytest.mark.parametrize(
    ("record", "command"),
    [
        (None, 'pip install "hubaoti[run,sign]"'),
        ({"url": "file:///src/hu%20bao", "dir_info": {"editable": True}}, "-e /src/hu bao"),
        ({"url": "file:///src/hu", "dir_info": {}}, "/src/hu"),
        ({"url": "file:///src/hu", "dir_info": {}, "subdirectory": "py"}, "/src/hu/py"),
        ({"url": "file:///a%22%24b%60%5Cc", "dir_info": {}}, r"/a\"\$b\`\\c"),
        (
            {
                "url": "https://me:secret@git.example/hubaoti.git",
                "vcs_info": {"vcs": "git", "commit_id": "4d5e6f", "requested_revision": "main"},
                "subdirectory": "python",
            },
            "@ git+https://git.example/hubaoti.git@4d5e6f#subdirectory=python",
        ),
        (
            {
                "url": "ssh://git@git.example/hubaoti.git",
                "vcs_info": {"vcs": "git", "commit_id": "4d5e6f"},
            },
            "@ git+ssh://git@git.example/hubaoti.git@4d5e6f",
        ),
        (
            {"url": "https://files.example/hubaoti-1.whl?token=secret", "archive_info": {}},
            "@ https://files.example/hubaoti-1.whl",
        ),
        ({"url": "file:///src/hu", "dir_info": None}, 'pip install "hubaoti[run,sign]"'),
        ([], 'pip install "hubaoti[run,sign]"'),
    ],
)
def test_extras_come_from_where_hubaoti_itself_was_installed(
    record: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No index has what was installed from a checkout or a URL."""
    if command.startswith("@ "):
        command = f'pip install "hubaoti[run,sign] {command}"'
    elif not command.startswith("pip"):
        flag, _, path = command.rpartition("-e ")
        command = f'pip install {"-e " * command.startswith("-e ")}"{path}[run,sign]"'
    known = tmp_path / "hubaoti-1.0.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: hubaoti\nVersion: 1.0\n")
    if record is not None:
        (known / "direct_url.json").write_text(json.dumps(record))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert format_install("run", "sign") == command


@pytest.mark.parametrize(("package", "version"), REFUSED)
def test_what_is_not_supported_is_refused_at_the_door_with_the_versions_that_are(
    package: str, version: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        {"torch": torch, "transformers": transformers}[package], "__version__", version
    )
    first, last = SUPPORTED[package]
    for what, verb in (VERBS | (OPENS if package == "torch" else {})).items():
        with pytest.raises(MissingDependency) as caught:
            verb(settings)
        assert str(caught.value) == (
            f"{what.removeprefix('explain') or 'compile'} needs {package} {first} to {last}, "
            f"and {package} {version} is installed"
        )
        assert caught.value.hint.startswith(f'pip install "{package}>={first},<')


def test_a_quantized_compile_says_at_the_door_what_to_install(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = extras.package_version
    monkeypatch.setattr(
        extras, "package_version", lambda package: None if package == "torchao" else found(package)
    )
    with pytest.raises(MissingDependency, match="int8wo needs torchao, which is not") as caught:
        hubaoti.compile("acme/none-such", quantize="int8wo", settings=settings)
    assert caught.value.hint == format_install("quantize")


def test_attach_needs_no_transformers_that_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    require("attach", "run")


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.11.1+cu130", "2.13.0a0+git0123abc", "2.15.9.post1+cpu"]
)
def test_every_build_of_a_supported_series_is_supported(version: str) -> None:
    assert is_supported("torch", version)


def test_pip_is_told_the_same_versions_and_extras() -> None:
    optional = PROJECT["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        told = {each.name: each.specifier for each in map(Requirement, optional[extra])}
        assert told.keys() == {*packages}
        for package in told.keys() & SUPPORTED.keys():
            first, last = SUPPORTED[package]
            beyond = f"{last.split('.')[0]}.{int(last.split('.')[1]) + 1}"
            assert str(told[package]) == f"<{beyond},>={first}"
    core = {Requirement(each).name for each in PROJECT["dependencies"]}
    assert not core & {name for packages in EXTRAS.values() for name in packages}
    (everything,) = (each for each in map(Requirement, optional["dev"]) if each.name == "hubaoti")
    assert everything.extras >= EXTRAS.keys()


def test_the_matrix_tries_both_ends_and_its_table_stands_in_the_readme() -> None:
    loader = SourceFileLoader("matrix", str(ROOT / "scripts" / "matrix"))
    matrix: Any = module_from_spec(spec_from_loader("matrix", loader))  # type: ignore[arg-type]
    sys.modules["matrix"] = matrix
    loader.exec_module(matrix)
    for package, ends in SUPPORTED.items():
        tried = [series(Version(getattr(row, package))) for row in matrix.ROWS]
        assert (tried[0], tried[-1]) == ends
    told = re.findall(r"^\| ([\d.]+)\S* \| (5[\d.]+) \|", (ROOT / "README.md").read_text(), re.M)
    assert told == [(row.torch, row.transformers) for row in matrix.ROWS]


def test_names_are_listed_as_a_sentence_has_them() -> None:
    assert [join_names([*"abc"[:n]]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
