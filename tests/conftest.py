"""What all tests share: homes in temporary folders, and an endpoint to talk to."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports a library that reads these once.
_HOME = Path(tempfile.mkdtemp(prefix="hubaoti-tests-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
for _name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_CACHE"):
    os.environ.pop(_name, None)
os.environ["HF_HOME"] = str(_HOME / "huggingface")
os.environ["HUBAOTI_HOME"] = str(_HOME / "hubaoti")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_HOME / "inductor")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from hubaoti.server import Endpoint, running  # noqa: E402


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A running endpoint, one for all tests: `.url` and `.token`."""
    with running(tmp_path_factory.mktemp("endpoint") / "root") as found:
        yield found
