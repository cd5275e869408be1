"""A Space in miniature: a main process that loads a module and forks workers, told what to do.

It runs by itself, so that what is forked is not a test runner with threads; it prints JSON.
"""

from __future__ import annotations

import contextvars
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Block(nn.Module):
    """Two layers, a buffer that is saved, a mask by name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.wide = nn.Linear(size, 2 * size)
        self.narrow = nn.Linear(2 * size, size)
        self.register_buffer("scale", torch.full((size,), 0.5))

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.narrow(torch.relu(self.wide(x))) * self.scale
        return x + (y if mask is None else y * mask)


class Net(nn.Module):
    """Equal blocks in a list, and layers that no graph of theirs serves."""

    def __init__(self, blocks: int = 3, size: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(8, size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(blocks))
        self.last = nn.Linear(size, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.first(x)
        mask = torch.ones_like(hidden)
        for block in self.blocks:
            hidden = block(hidden, mask=mask)
        return {"y": self.last(hidden)}


def net() -> Net:
    """The same one in every process."""
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
BIG = torch.ones(512, 512)  # its product takes threads, which a forked child has not


def worker(work: Callable[[], Any]) -> dict[str, Any]:
    """What a forked child answers; `killed` where it was, before it could."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(writing, json.dumps(work()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    text = b""
    while chunk := os.read(reading, 1 << 16):
        text += chunk
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    return json.loads(text) if text else {"killed": os.WIFSIGNALED(status), "status": status}


class Space:
    """A module with a repo's graphs, and what it answers by itself."""

    def __init__(self, repo: str, **how: Any) -> None:
        import hubaoti.spaces

        self.module = net()
        with torch.no_grad():
            self.expected = net()(X)["y"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.loaded = hubaoti.spaces.load(self.module, repo, trust=True, **how)
        torch.mm(BIG, BIG)
        self.warned = [type(each.message).__name__ for each in caught]

    def ask(self, times: int = 1) -> dict[str, Any]:
        """Calls of this process: how far from eager the answers are, and the counts."""
        off = 0.0
        torch.mm(BIG, BIG)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            for _ in range(times):
                off = max(off, (self.module(X)["y"] - self.expected).abs().max().item())
        return {"off": off, "stats": self.loaded.stats()}

    def workers(self, count: int, times: int = 1) -> list[dict[str, Any]]:
        """The answers of so many workers, one after the other."""
        return [worker(lambda: self.ask(times)) for _ in range(count)]


def few(repo: str, **how: Any) -> dict[str, Any]:
    """Three workers, then the main process, then a worker again."""
    space = Space(repo, **how)
    before, main = space.workers(3, 2), space.ask()
    after = space.workers(1)
    space.loaded.detach()
    clean = "forward" not in vars(space.module)
    clean &= not any("forward" in vars(block) for block in space.module.blocks)
    said = {"workers": before, "main": main, "after": after[0], "clean": clean}
    return {**said, "warned": space.warned, "regions": list(space.loaded.regions)}


def fifty(repo: str) -> dict[str, Any]:
    """Fifty workers, of which every second is killed while it answers."""
    space = Space(repo)
    space.workers(3, 2)
    before, size, chance = files(), memory(), random.Random(7)
    for at in range(50):
        if at % 2:
            answer = space.workers(1)[0]
            assert answer["off"] < 1e-5 and answer["stats"]["compiled"] == 3, answer
        else:
            killed(space, chance.uniform(0.0, 0.06))
    return {"new": sorted(files() - before), "grown": memory() - size, "left": children()}


def killed(space: Space, after: float) -> None:
    """A worker that is ended by the system, after some seconds."""
    pid = os.fork()
    if pid == 0:
        while True:
            space.ask()
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def files() -> set[str]:
    """Every file that a worker could leave."""
    folders = (Path(tempfile.gettempdir()), Path(os.environ["HUBAOTI_HOME"]))
    return {str(path) for folder in folders for path in folder.rglob("*")}


def memory() -> int:
    """The bytes that this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def children() -> list[str]:
    """The processes that are ours, or were left by ours, each by its command."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
            ours = os.environ["HUBAOTI_HOME"].encode() in (each / "environ").read_bytes()
        except OSError:
            continue
        if parent == os.getpid() or (ours and int(each.name) != os.getpid()):
            found.append(each.name)
    return found


def crowd(repo: str) -> dict[str, Any]:
    """A worker whose first calls come from plain threads and fresh contexts, all at once."""
    from hubaoti.attachment import attach

    space = Space(repo)
    opened, real = [], attach.attach_graphs

    def counting(*args: Any, **kwargs: Any) -> Any:
        opened.append(threading.get_ident())
        return real(*args, **kwargs)

    def work() -> dict[str, Any]:
        attach.attach_graphs = counting
        answers: list[dict[str, Any]] = []
        start = threading.Barrier(8)

        def call() -> None:
            start.wait()
            answers.append(contextvars.Context().run(space.ask))

        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        offs = [each["off"] for each in answers]
        return {"opened": len(opened), "off": max(offs), "answers": len(answers)}

    return {"crowd": worker(work), "again": worker(work)}


def parent_first(repo: str) -> dict[str, Any]:
    """The main process has opened its graphs, and used its threads, before it forks."""
    space = Space(repo)
    main = [space.ask(), space.ask()][-1]
    after = space.workers(2)
    return {"main": main, "workers": after, "then": space.ask(), "pid": os.getpid()}


def tampered(repo: str) -> dict[str, Any]:
    """A byte of a library changes after it was pulled and verified."""
    space = Space(repo)
    library = next(Path(os.environ["HUBAOTI_HOME"]).rglob("graphs/*/**/*.so"))
    library.chmod(0o600)
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    return space.workers(1)[0]


def first_opens(repo: str) -> dict[str, Any]:
    """Who opens a graph in a process of its own: the first worker, and nobody else."""
    import subprocess

    space, started, real = Space(repo), [], subprocess.Popen

    class Counting(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            started.append(1)
            super().__init__(*args, **kwargs)

    subprocess.Popen = Counting  # type: ignore[misc]
    main = len(started)
    each = [worker(lambda: {"off": space.ask()["off"], "started": len(started)}) for _ in range(3)]
    return {"main": main, "workers": each}


def revoked(repo: str, **how: Any) -> dict[str, Any]:
    """Workers before and after the repo's owner is trusted no more, and trusted again, and blocked.

    The main process is not told: it loaded the module once.
    """
    from hubaoti.mirror.trust import Trust
    from hubaoti.settings import Settings

    space, settings = Space(repo, **how), Settings.from_env()
    trust, who = Trust(settings.trust), (settings.endpoint, repo.partition("/")[0])
    told = {"before": space.workers(2, 2)[1]}
    for name, change in (("rm", trust.remove), ("add", trust.add), ("block", trust.block)):
        change(*who)
        told[name] = space.workers(1, 2)[0]
    return told


SCENES: dict[str, Callable[..., dict[str, Any]]] = {
    scene.__name__: scene
    for scene in (few, fifty, crowd, parent_first, tampered, first_opens, revoked)
}

if __name__ == "__main__":
    scene, repo, how = sys.argv[1:]
    told = SCENES[scene](repo, **json.loads(how))
    sys.stdout.write(json.dumps(told))
