"""Other ways to the endpoint: the `hf` command, and the client with Xet off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hubaoti.server import Endpoint

HF = Path(sys.executable).with_name("hf")
CONTENT = os.urandom(2_000_000)

CLIENT = """
import io, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi, constants
assert constants.HF_HUB_DISABLE_XET
url, token, folder = sys.argv[1:]
api = HfApi(url, token=token)
api.create_repo("off/r")
content = Path(folder, "in/big.bin").read_bytes()
api.upload_folder(repo_id="off/r", folder_path=Path(folder, "in"))
buffer = io.BytesIO(content[::-1])
api.upload_file(path_or_fileobj=buffer, path_in_repo="buffer.bin", repo_id="off/r")
copy = [CommitOperationCopy("big.bin", "d/copy.bin"), CommitOperationAdd("e.bin", b"")]
api.create_commit("off/r", copy, commit_message="copy")
found = Path(api.snapshot_download("off/r", cache_dir=Path(folder, "cache")))
assert (found / "d/copy.bin").read_bytes() == content == (found / "big.bin").read_bytes()
assert (found / "buffer.bin").read_bytes() == content[::-1]
assert (found / "small.txt").read_text() == "small" and (found / "e.bin").read_bytes() == b""
api.verify_repo_checksums("off/r", cache_dir=Path(folder, "cache"))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/big.bin").write_bytes(CONTENT)
    (tmp_path / "in/small.txt").write_text("small")
    return tmp_path


def run(*command: object, **env: str) -> str:
    said = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said.returncode == 0, said.stderr
    return said.stdout


def test_with_xet_off_files_go_by_lfs_and_come_back_whole(endpoint: Endpoint, folder: Path) -> None:
    words = (endpoint.url, endpoint.token, folder)
    run(sys.executable, "-c", CLIENT, *words, HF_HUB_DISABLE_XET="1")


def test_the_hf_command_does_its_daily_work(endpoint: Endpoint, folder: Path) -> None:
    def hf(*words: object) -> str:
        return run(HF, *words, HF_ENDPOINT=endpoint.url, HF_TOKEN=endpoint.token)

    assert "local" in hf("auth", "whoami")
    hf("repos", "create", "cli/r")
    hf("upload", "cli/r", folder / "in")
    hf("repos", "tag", "create", "cli/r", "v1")
    assert "v1" in hf("repos", "tag", "list", "cli/r")
    hf("repos", "delete-files", "cli/r", "small.txt")
    hf("download", "cli/r", "--revision", "v1", "--local-dir", folder / "out")
    for path in ("big.bin", "small.txt"):
        assert (folder / "out" / path).read_bytes() == (folder / "in" / path).read_bytes()
    assert "cli/r" in hf("models", "list", "--author", "cli", "--format", "json")
    hf("repos", "move", "cli/r", "cli/moved")
    hf("repos", "delete", "cli/moved", "--yes")
