"""The road from end to end: compile, push, pull on an empty machine, run, and be attacked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from commands import environment_of, hubaoti
from huggingface_hub import HfApi

from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import BadPackage, DigestMismatch, Untrusted
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

REPO = "acme/journey"
TEXTS = [
    "The cat sits on the warm windowsill.",
    "A kitten is sleeping by the window.",
    "The central bank raised interest rates again, and borrowing money became expensive.",
]


@pytest.fixture(scope="module")
def published(minilm_bundle: Bundle, endpoint: Endpoint, built_at: Settings) -> str:
    """MiniLM's bundle in a repo; its commit."""
    publisher = Settings(built_at.home, endpoint.url, endpoint.token)
    done = hubaoti(publisher, "push", "--as-is", minilm_bundle.path, REPO, "--tag", "v1")
    assert done.code == 0, done
    return str(HfApi(endpoint.url, token=endpoint.token).model_info(REPO).sha)


@pytest.fixture
def machine(published: str, endpoint: Endpoint, tmp_path: Path) -> Settings:
    """A machine with an empty home and no token."""
    return Settings(tmp_path / "home", endpoint.url)


def answers(machine: Settings, model: Path, *words: str) -> torch.Tensor:
    """The vectors of the texts, by the command line."""
    texts = [word for text in TEXTS for word in ("--text", text)]
    done = hubaoti(machine, "run", f"{REPO}@v1", "--model", model, *texts, "--json", *words)
    assert done.code == 0, done
    return torch.tensor(json.loads(done.out)["values"])


@pytest.fixture(scope="module")
def expected(minilm: Path) -> torch.Tensor:
    """What transformers answer, without a line of ours: mean over the tokens, normalized."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=1)


def unpacked(machine: Settings) -> Path:
    """The library in a machine's mirror."""
    (library,) = (machine.mirror / "graphs").rglob("*.wrapper.so")
    return library


def test_a_pulled_graph_answers_as_eager(
    machine: Settings, minilm: Path, expected: torch.Tensor
) -> None:
    found = answers(machine, minilm, "--trust")
    assert (found - expected).abs().max() < 1e-5
    eager = answers(machine, minilm, "--eager")
    assert (eager - expected).abs().max() < 1e-5
    assert found[0] @ found[1] > 0.5 > found[0] @ found[2]


def test_a_second_pull_is_from_the_mirror(machine: Settings) -> None:
    first = json.loads(hubaoti(machine, "pull", REPO, "--trust", "--json").out)
    second = json.loads(hubaoti(machine, "pull", REPO, "--json").out)
    assert (first["from_mirror"], second["from_mirror"]) == (False, True)
    assert first["digest"] == second["digest"]


def test_a_full_commit_that_is_here_asks_the_hub_nothing(
    machine: Settings, published: str, minilm: Path, expected: torch.Tensor
) -> None:
    assert hubaoti(machine, "pull", f"{REPO}@{published}", "--trust").code == 0
    environment = environment_of(machine) | {"HF_HUB_OFFLINE": "1"}
    words = ["run", f"{REPO}@{published}", "--model", str(minilm), "--text", TEXTS[0], "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "hubaoti.cli", *words],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (value,) = json.loads(done.stdout)["values"]
    assert (torch.tensor(value) - expected[0]).abs().max() < 1e-5


PROGRAM = """
import json, sys
from hubaoti.cli import dispatch
code = dispatch(json.loads(sys.argv[1]))
heavy = sorted({"torch", "transformers", "huggingface_hub", "starlette"} & {*sys.modules})
print(json.dumps([code, heavy]))
"""


def loaded(machine: Settings, *words: str) -> tuple[int, list[str]]:
    """The exit code of a command, and which heavy modules it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(words)],
        env=environment_of(machine),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    return code, heavy


def test_pull_needs_no_torch_and_run_no_transformers(
    machine: Settings, published: str, minilm: Path
) -> None:
    assert loaded(machine, "pull", REPO, "--trust", "-q") == (0, ["huggingface_hub"])
    pinned = f"{REPO}@{published}"
    assert loaded(machine, "pull", pinned, "-q") == (0, [])
    words = ["run", pinned, "--model", str(minilm), "--text", TEXTS[0], "-q"]
    assert loaded(machine, *words) == (0, ["torch"])


def test_an_untrusted_publisher_s_code_is_neither_kept_nor_run(
    machine: Settings, minilm: Path
) -> None:
    done = hubaoti(machine, "run", REPO, "--model", minilm, "--text", "x")
    assert done.code == Untrusted.exit_code == 4
    assert "acme" in done.err and "--trust" in done.err
    assert not [*machine.mirror.rglob("*.so")]


@pytest.fixture
def poisoned(machine: Settings) -> Iterator[Path]:
    """The library in the mirror with one bit flipped."""
    assert hubaoti(machine, "pull", f"{REPO}@v1", "--trust").code == 0
    library = unpacked(machine)
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.chmod(0o755)
    library.write_bytes(content)
    library.chmod(0o555)
    yield library


def test_a_flipped_bit_is_never_opened_and_the_next_pull_heals_it(
    machine: Settings, poisoned: Path, minilm: Path, expected: torch.Tensor
) -> None:
    done = hubaoti(machine, "run", f"{REPO}@v1", "--model", minilm, "--text", "x")
    assert done.code == DigestMismatch.exit_code == 10
    assert "quarantine" in done.err
    assert done.out == ""
    assert not poisoned.exists()
    assert [*(machine.mirror / "quarantine").rglob(poisoned.name)]
    assert json.loads(hubaoti(machine, "mirror", "ls", "--json").out) == []
    assert (answers(machine, minilm) - expected).abs().max() < 1e-5


def test_a_flipped_bit_in_the_repo_is_never_unpacked(
    machine: Settings, minilm_bundle: Bundle, endpoint: Endpoint, tmp_path: Path
) -> None:
    """An attacker who can write to the repo, and not to the manifest, is found out."""
    repo = f"acme/{tmp_path.name}"
    owner = Settings(tmp_path / "owner", endpoint.url, endpoint.token)
    assert hubaoti(owner, "push", "--as-is", minilm_bundle.path, repo).code == 0
    hub = HfApi(endpoint.url, token=endpoint.token)
    (path,) = [name for name in hub.list_repo_files(repo) if name.endswith(".pt2")]
    content = bytearray((minilm_bundle.path / "graphs" / Path(path).name).read_bytes())
    content[len(content) // 2] ^= 1
    hub.upload_file(path_or_fileobj=bytes(content), path_in_repo=path, repo_id=repo)
    done = hubaoti(machine, "pull", repo, "--trust")
    assert done.code in {DigestMismatch.exit_code, BadPackage.exit_code}
    assert not [*machine.mirror.rglob("*.so")]
    assert json.loads(hubaoti(machine, "mirror", "ls", "--json").out) == []
