"""Children of one process that never touched a device: each attaches, answers, and ends.

    python gpu_forks.py DEVICE BUNDLE HOME COUNT

says as JSON how each of them ended, and how many MB of the GPU were in use before and after. In
between one more is killed while it answers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers  # so that no child has to

import hubaoti
from hubaoti.bundle import Bundle
from hubaoti.settings import Settings

SECONDS = 60  # that a child has to answer
LEFT = 10  # seconds that a driver has to take memory back


def answer(device: str, bundle: Path, home: Path) -> Iterator[float]:
    """How far the graphs are off eager, again and again, of a model of this process's own."""
    torch.set_num_threads(1)  # the parent's threads are not here, and would be waited for
    read = Bundle.read(bundle)
    folder = bundle.parent.parent / "models" / bundle.name
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
        ids = torch.arange(3, 19)[None]
    words: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    words |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    words |= {"cache_implementation": "static", "pad_token_id": 0}
    expected = model.generate(ids, **words).logits[0].double()
    settings = Settings(home=home, endpoint="http://127.0.0.1:9")
    with hubaoti.attach(model, read, strict=True, settings=settings):
        while True:
            found = model.generate(ids, **words).logits[0].double()
            yield float((found - expected).norm() / expected.norm())


def forked(work: Callable[[int], None]) -> tuple[int, int]:
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
    except BaseException as why:
        os.write(theirs, json.dumps({"error": f"{type(why).__name__}: {why}"[:2000]}).encode())
    finally:
        os._exit(code)


def heard(pipe: int) -> dict[str, Any]:
    """What a child says first.

    Raises:
        SystemExit: nothing, or an error.
    """
    import select

    ready, _, _ = select.select([pipe], [], [], SECONDS)
    said = os.read(pipe, 4096) if ready else b""
    found: dict[str, Any] = json.loads(said or b'{"error": "it said nothing"}')
    if "error" in found:
        raise SystemExit(f"a child failed: {found['error']}")
    return found


def ended(child: int, pipe: int, kill: bool) -> dict[str, Any]:
    """How a child ended that answered; one that is killed is answering then."""
    try:
        found = heard(pipe)
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


def used(device: str) -> int | None:
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
    device, bundle, home, count = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]

    def once(pipe: int) -> None:
        start = time.perf_counter()
        off = next(answer(device, bundle, home))
        os.write(pipe, json.dumps({"off": off, "seconds": time.perf_counter() - start}).encode())

    def for_ever(pipe: int) -> None:
        for off in answer(device, bundle, home):
            os.write(pipe, json.dumps({"off": off}).encode())
            pipe = os.open(os.devnull, os.O_WRONLY)

    before, children = used(device), []
    for at in range(int(count) + 1):
        kill = at == int(count) // 2
        children.append(ended(*forked(for_ever if kill else once), kill))
    if torch.cuda.is_initialized():
        raise SystemExit("the parent touched the device")
    after, until = used(device), time.monotonic() + LEFT
    while before is not None and (after or 0) > before + 16 and time.monotonic() < until:
        time.sleep(0.2)
        after = used(device)
    said = {"children": children, "used": None if before is None else [before, after]}
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
