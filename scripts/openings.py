"""How long opening a graph takes, each way in a process of its own; for quickstart and bench."""

import os
import subprocess
import sys
from pathlib import Path

PUBLIC = """
import sys, time, torch
from torch._inductor import aoti_load_package
start = time.perf_counter()
aoti_load_package(sys.argv[1])
print(time.perf_counter() - start)
"""
# The whole of what hubaoti does to a graph that is in the mirror, its digests included.
OURS = """
import sys, time, torch
from pathlib import Path
from hubaoti.mirror import Mirror
from hubaoti.runtime.graph import open_graph
with Mirror.open(Path(sys.argv[1])) as mirror:
    artifact = mirror.artifact(sys.argv[2])
    entry = artifact.manifest.graphs[0]
    start = time.perf_counter()
    mirror.verify_graph(entry)
    open_graph(artifact.graph_folder(entry), entry, torch.device("cpu"))
    print(time.perf_counter() - start)
"""


def seconds_to_open(program: str, cache: Path, *arguments: object) -> float:
    """Run PUBLIC (a .pt2) or OURS (a mirror, a digest), with inductor's cache in a folder."""
    words = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
