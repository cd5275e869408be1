"""Models in processes of their own: what ends there ends one request."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hubaoti import LightweightEngine
from hubaoti.artifact.bundle import Bundle
from hubaoti.engines.pool import NoGraphs
from hubaoti.errors import (
    BadInput,
    BadRequest,
    HubaotiError,
    NotEnoughMemory,
    OutOfBounds,
    Quarantined,
    WorkerEnded,
    rebuild_error,
)
from hubaoti.host.memory import list_descendants, measure_process_memory
from hubaoti.host.processes import describe_exit
from hubaoti.mirror import Mirror
from hubaoti.settings import Settings

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
LONG: dict[str, Any] = {"max_new_tokens": 50, "do_sample": False}


@pytest.fixture(scope="module")
def home(
    built_at: Settings, decoder_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    """A home of this file's own, with the decoder's graphs."""
    found = tmp_path_factory.mktemp("isolated") / "home"
    shutil.copytree(built_at.home, found)
    return replace(built_at, home=found)


@pytest.fixture(scope="module")
def engine(home: Settings, tiny_decoder: Path) -> Iterator[LightweightEngine]:
    """An engine with the decoder in a worker."""
    with LightweightEngine(home, isolate=True) as found:
        found.load(tiny_decoder)
        yield found


def pid(engine: LightweightEngine) -> int:
    """Of the only model's worker."""
    found = engine.models()[0].pid
    assert found is not None
    return found


def in_the_middle(engine: LightweightEngine, model: Path, number: int) -> str:
    """Send a signal to a worker while it generates; what its request says."""
    worker, stop = pid(engine), threading.Event()

    def strike() -> None:
        before = engine.models()[0].requests
        while engine.models()[0].requests == before and not stop.is_set():
            time.sleep(0.001)
        wait_until(lambda: strike_in_a_graph() or stop.is_set())

    def strike_in_a_graph() -> bool:
        """Stop it, look, and strike where a graph runs: what runs on may have ended its request."""
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: state_of(worker) in {"T", "Z", None})
        if found := is_running(engine, model):
            os.kill(worker, number)
        with suppress(ProcessLookupError):  # one that was killed may be gone already
            os.kill(worker, signal.SIGCONT)
        return found

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        with pytest.raises(WorkerEnded) as why:
            for _ in range(200):
                engine.generate(model, ["hello"] * 4, **LONG)
        assert "ask again" in why.value.hint
        return str(why.value)
    finally:
        stop.set()
        thread.join()


def is_running(engine: LightweightEngine, model: Path) -> bool:
    """Whether a graph has been called for the request that is answered now."""
    holder: Any = engine._room.get(str(model)).holder
    return any(holder._running[:4])


def state_of(process: int) -> str | None:
    """The letter of a process's state, as R, T or Z; none where there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def is_alive(process: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    return state_of(process) not in {"Z", None}


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that comes by itself."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_answers_as_this_process_does(
    engine: LightweightEngine, home: Settings, tiny_decoder: Path
) -> None:
    assert pid(engine) != os.getpid()
    items = [("A cat sits", " here"), ("hello", " you")]
    with LightweightEngine(home) as here:
        here.load(tiny_decoder)
        assert engine.generate(tiny_decoder, "hello", **GREEDY) == here.generate(
            tiny_decoder, "hello", **GREEDY
        )
        for ours, theirs in zip(
            engine.score(tiny_decoder, items), here.score(tiny_decoder, items), strict=True
        ):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert engine.embed(tiny_decoder, ["a", "b"]).shape == (2, 32)
    state = engine.state(tiny_decoder)
    assert state.compiled > 0
    assert state.eager == 0


def test_an_error_of_a_worker_is_raised_here_as_it_was(
    engine: LightweightEngine, tiny_decoder: Path
) -> None:
    before = pid(engine)
    with pytest.raises(OutOfBounds, match="64 positions") as why:
        engine.generate(tiny_decoder, "word " * 80, **GREEDY)
    assert "max_new_tokens" in why.value.hint
    assert pid(engine) == before


def test_a_worker_that_is_killed_costs_one_request(
    engine: LightweightEngine, tiny_decoder: Path
) -> None:
    expected = engine.generate(tiny_decoder, "hello", **GREEDY)
    before = pid(engine)
    told = in_the_middle(engine, tiny_decoder, signal.SIGKILL)
    assert "tiny-decoder" in told
    assert "SIGKILL" in told
    assert not is_alive(before)
    assert pid(engine) != before
    assert engine.generate(tiny_decoder, "hello", **GREEDY) == expected
    assert engine.models()[0].state == "compiled", "a kill says nothing of its graphs"


def test_unloading_gives_all_memory_back(home: Settings, tiny_decoder: Path) -> None:
    own = str(os.getpid())
    with LightweightEngine(home, isolate=True) as engine:
        engine.load(tiny_decoder)
        worker = pid(engine)
        standing = engine.models()[0]
        assert standing.bytes == pytest.approx(measure_process_memory(str(worker)), rel=0.2)
        assert str(worker) in list_descendants(own)
        engine.unload(tiny_decoder)
        assert not is_alive(worker)
        assert str(worker) not in list_descendants(own)


def test_a_worker_ends_with_its_engine_even_while_it_answers(
    home: Settings, tiny_decoder: Path
) -> None:
    program = (
        "import sys; from hubaoti import LightweightEngine; from hubaoti.settings import Settings;"
        "from pathlib import Path;"
        f"engine = LightweightEngine(Settings(Path({str(home.home)!r})), isolate=True);"
        f"print(engine.load({str(tiny_decoder)!r}).pid, flush=True);"
        f"[engine.generate({str(tiny_decoder)!r}, 'hello', max_new_tokens=50) for _ in range(999)]"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_alive(worker)
        parent.kill()
    wait_until(lambda: not is_alive(worker))


def test_an_interrupt_leaves_no_answer_for_the_next_request(
    engine: LightweightEngine, tiny_decoder: Path
) -> None:
    expected = engine.generate(tiny_decoder, "hello", **GREEDY)
    before = pid(engine)
    engine.measure(tiny_decoder, ["hello"], max_new_tokens=4)  # which no graph answers, and says so

    def strike() -> None:
        wait_until(lambda: is_running(engine, tiny_decoder))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=strike).start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(200):
            engine.generate(tiny_decoder, ["A cat sits on"] * 40, **LONG)
    assert not is_alive(before)
    assert engine.generate(tiny_decoder, "hello", **GREEDY) == expected


def test_a_model_that_cannot_be_loaded_leaves_no_worker(
    home: Settings, tiny_decoder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_decoder, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    before = list_descendants(str(os.getpid()))
    with LightweightEngine(replace(home, graphs=False), isolate=True) as engine:
        with pytest.raises(HubaotiError, match="weights"):
            engine.load(broken)
        assert engine.models() == []
    assert list_descendants(str(os.getpid())) == before


def test_a_worker_counts_with_its_process(home: Settings, tiny_decoder: Path) -> None:
    with (
        LightweightEngine(home, isolate=True, memory="64MB") as engine,
        pytest.raises(NotEnoughMemory, match="takes 4"),
    ):
        engine.load(tiny_decoder)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ([1], BadRequest),
        ([{"role": "user"}], BadRequest),
        ({"role": "user"}, BadRequest),
        (None, BadRequest),
        ([object()], BadRequest),
        ([[{"content": object()}]], BadRequest),
        (["half \ud83d"], BadInput),
    ],
)
def test_what_is_no_prompt_never_reaches_a_worker(
    said: Any, kind: type[HubaotiError], engine: LightweightEngine, tiny_decoder: Path
) -> None:
    before = pid(engine)
    with pytest.raises(kind):
        engine.generate(tiny_decoder, said)
    with pytest.raises(BadRequest):
        engine.generate(tiny_decoder, "hello", seed=2**70)
    assert pid(engine) == before
    assert is_alive(before)


def test_the_folder_somebody_is_in_is_no_code_of_a_worker(
    home: Settings, tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "resource.py").write_text("raise SystemExit('stolen')")
    monkeypatch.chdir(tmp_path)
    with LightweightEngine(home, isolate=True) as engine:
        assert engine.load(tiny_decoder).state == "compiled"


@pytest.mark.parametrize("number", [2, 2**32 - 1])
def test_a_number_that_is_no_graph_s_blames_none(
    engine: LightweightEngine, tiny_decoder: Path, number: int
) -> None:
    """What crashes may have written anything there."""
    holder: Any = engine._room.get(str(tiny_decoder)).holder
    assert holder._begin.digest is not None
    assert holder._blame(number) == ""
    assert holder._crashes == {}


def test_a_graph_that_crashed_twice_is_kept_apart_and_the_model_goes_on(
    engine: LightweightEngine, home: Settings, tiny_decoder: Path, decoder_bundle: Bundle
) -> None:
    """The last test of this file: the artifact is not in its home any more."""
    expected = engine.generate(tiny_decoder, "hello", **GREEDY)
    assert "graph model.layers" in in_the_middle(engine, tiny_decoder, signal.SIGSEGV)
    assert engine.generate(tiny_decoder, "hello", **GREEDY) == expected
    assert engine.models()[0].state == "compiled"
    with pytest.warns(NoGraphs, match="crashed its process twice"):
        assert "quarantine" in in_the_middle(engine, tiny_decoder, signal.SIGSEGV)
    assert engine.generate(tiny_decoder, "hello", **GREEDY) == expected
    (standing,) = engine.models()
    assert (standing.state, standing.artifact) == ("eager", None)
    assert "crashed its process twice" in standing.why
    assert engine.state(tiny_decoder).compiled == 0
    with Mirror.open(home.mirror) as mirror:
        assert mirror.artifact(decoder_bundle.manifest.digest) is None
    digest = decoder_bundle.manifest.digest
    assert len([*(home.mirror / "quarantine").glob(f"{digest}~*")]) == 1
    with pytest.raises(Quarantined, match="crashed its process twice"):
        engine.load(tiny_decoder, decoder_bundle)  # its very bytes again


def test_errors_of_other_processes_are_ours_again() -> None:
    assert isinstance(rebuild_error("OutOfBounds", "m", "h"), OutOfBounds)
    for kind in ("first_line", "Exception", "nothing", "LINE"):
        assert type(rebuild_error(kind, "m", "h")) is HubaotiError


def test_how_a_process_ended_is_said_in_words() -> None:
    assert "signal 40" in describe_exit(-40)  # of real time, which has no name
    assert "SIGSEGV" in describe_exit(-signal.SIGSEGV)
    assert "SIGKILL" in describe_exit(-signal.SIGKILL)
    assert "code 3" in describe_exit(3)
