"""Children of one process that never touched a device, as a ZeroGPU Space forks its workers.

The parent has a model on the CPU and plans its graphs; each child moves the model to the device,
which opens them at the first call, answers, and ends.

    python tests/gpu/forks.py DEVICE BUNDLE CONFIG HOME COUNT

says as JSON how each of them ended, and how many MB of the GPU were in use before and after. In
between one more is killed while it answers.
"""

from __future__ import annotations

import copy
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers  # so that no child has to

from hubaoti.api import get_artifact
from hubaoti.artifact.bundle import Bundle
from hubaoti.host.probe import probe_host
from hubaoti.hub.layout import artifact_path
from hubaoti.hub.pull_all import Offer
from hubaoti.progress import report_nothing
from hubaoti.settings import Settings
from hubaoti.spaces import plan_modules
from hubaoti.spaces.worker import defer_artifacts

SECONDS = 60  # that a child has to answer
LEFT = 10  # seconds that a driver has to take memory back


class Parent:
    """A process with a model on the CPU and nothing open: a ZeroGPU Space's main process."""

    def __init__(self, device: str, bundle: Path, folder: Path, home: Path) -> None:
        self.device = device
        read = Bundle.read(bundle)
        config = transformers.AutoConfig.from_pretrained(folder)
        torch.manual_seed(0)
        auto: Any = transformers.AutoModelForCausalLM
        self.model = auto.from_config(config, dtype=config.dtype)
        self.model.eval()
        settings = Settings(home=home, endpoint="http://127.0.0.1:9", zerogpu=True)
        artifact = get_artifact(read, trust=True, settings=settings, progress=report_nothing)
        offer = Offer(artifact_path(read.manifest), artifact)
        plans = plan_modules(self.model, [offer])
        how: dict[str, Any] = {"strict": True, "recipe": None}
        self.loaded = defer_artifacts(self.model, plans, probe_host(settings), settings, **how)

    def answers(self) -> Iterator[dict[str, Any]]:
        """In a child: how far its graphs are off eager, again and again, on the device."""
        torch.set_num_threads(1)  # the parent's threads are not here, and would be waited for
        self.model.to(self.device)
        ids = torch.arange(3, 19, device=self.device)[None]
        words: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
        words |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
        words |= {"cache_implementation": "static", "pad_token_id": 0}
        own = copy.deepcopy(self.model)  # a copy is of the model as it was
        expected = own.generate(ids, **words).logits[0].double()
        while True:
            found = self.model.generate(ids, **words).logits[0].double()
            stats = self.loaded.stats()
            if not stats["compiled"]:
                raise RuntimeError(f"no graph answered: {stats}")
            off = float((found - expected).norm() / expected.norm())
            yield {"off": off, "compiled": stats["compiled"], "eager": stats["eager"]}


def fork_child(work: Callable[[int], None]) -> tuple[int, int]:
    """A child that works and ends, and where it is heard."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(theirs)
        return child, ours
    code = 1
    try:
        os.close(ours)
        work(theirs)
        code = 0
    except BaseException as error:
        os.write(theirs, json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]}).encode())
    finally:
        os._exit(code)


def read_first_answer(pipe: int) -> dict[str, Any]:
    """What a child says first.

    Raises:
        SystemExit: nothing, or an error.
    """
    ready, _, _ = select.select([pipe], [], [], SECONDS)
    said = os.read(pipe, 4096) if ready else b""
    found: dict[str, Any] = json.loads(said or b'{"error": "it said nothing"}')
    if "error" in found:
        raise SystemExit(f"a child failed: {found['error']}")
    return found


def end_child(child: int, pipe: int, kill: bool) -> dict[str, Any]:
    """How a child ended that answered; one that is killed is answering then."""
    try:
        found = read_first_answer(pipe)
    except SystemExit:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(pipe)
    if kill:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {"signal": -code} if code < 0 else found


def read_used_memory(device: str) -> int | None:
    """MB of a GPU that are in use, as its driver says without touching it."""
    if device == "cpu":
        return None
    import pynvml

    pynvml.nvmlInit()
    place = pynvml.nvmlDeviceGetHandleByIndex(torch.device(device).index or 0)
    megabytes = int(pynvml.nvmlDeviceGetMemoryInfo(place).used) >> 20
    pynvml.nvmlShutdown()
    return megabytes


def main() -> None:
    """Fork, one after the other; say what came of it."""
    device, (bundle, folder, home), count = sys.argv[1], map(Path, sys.argv[2:5]), sys.argv[5]
    before, children = read_used_memory(device), []
    parent = Parent(device, bundle, folder, home)

    def once(pipe: int) -> None:
        start = time.perf_counter()
        said = next(parent.answers())
        os.write(pipe, json.dumps({**said, "seconds": time.perf_counter() - start}).encode())

    def for_ever(pipe: int) -> None:
        for said in parent.answers():
            os.write(pipe, json.dumps(said).encode())
            pipe = os.open(os.devnull, os.O_WRONLY)

    for index in range(int(count) + 1):
        kill = index == int(count) // 2
        children.append(end_child(*fork_child(for_ever if kill else once), kill))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise SystemExit("the parent touched the device")
    after, until = read_used_memory(device), time.monotonic() + LEFT
    while before is not None and (after or 0) > before + 16 and time.monotonic() < until:
        time.sleep(0.2)
        after = read_used_memory(device)
    said = {"children": children, "used": None if before is None else [before, after]}
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
