"""`hubaoti run` of prompts, and of files of them: each is answered once, whatever happens."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import HUBAOTI, Done, environment_of, hubaoti, inside

from hubaoti import LightweightEngine
from hubaoti.artifact.bundle import Bundle
from hubaoti.cli import prompts as prompts_of_cli
from hubaoti.engines import batch_file
from hubaoti.errors import BadRequest, Conflict, OutOfBounds, OutputExists
from hubaoti.settings import Settings

COUNT = 60
ASKED = batch_file.BatchRequest("m", {"max_new_tokens": 3})
ANSWER = (
    b'{"line":%d,"model":"%s","prompt":"%s","text":"","tokens":1,"finish":"stop","asked":"%s"}\n'
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of prompts, in every form."""
    lines: list[Any] = [{"prompt": f"hello {at}", "id": f"p{at}"} for at in range(COUNT - 2)]
    lines += ["just a text", {"prompt": "with more", "label": 3}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return file


def run(built_at: Settings, model: Path, *words: object) -> Done:
    """The command in this process; its model is loaded anew each time."""
    greedy = ("--temperature", "0", "--max-new-tokens", "3")
    return inside(built_at, "run", "--model", model, *greedy, *words)


def lines_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def model(tiny_decoder: Path, decoder_bundle: Bundle) -> Path:
    """The decoder, whose graphs the mirror has."""
    return tiny_decoder


def test_prompts_are_answered_by_what_the_mirror_has(
    built_at: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(built_at, model, "--prompt", "hello", "--prompt", "A cat sits")
    assert done.code == 0, done
    assert [line[:6] for line in done.out.splitlines()] == ["hello ", "A cat "]
    assert "graphs answered 6 calls" in done.err
    plain = run(built_at, model, "--prompt", "hello", "--prompt", "A cat sits", "--eager")
    assert plain.out == done.out
    assert "answered without graphs: --eager says so" in plain.err
    monkeypatch.setenv("AOTI_DISABLED", "1")
    plain = run(built_at, model, "--prompt", "hello")
    assert "answered without graphs: the settings say so (AOTI_DISABLED" in plain.err
    monkeypatch.delenv("AOTI_DISABLED")
    told = json.loads(run(built_at, model, "--prompt", "hello", "--json").out)
    assert told["artifact"]
    assert (told["compiled"], told["eager"]) == (6, 0)
    assert len(told["answers"][0]["tokens"]) == 3


def test_graphs_of_a_repo_answer_prompts(
    settings: Settings, repo: str, decoder_bundle: Bundle, tiny_decoder: Path
) -> None:
    assert hubaoti(settings, "push", "--as-is", decoder_bundle.path, repo).code == 0
    stranger = replace(settings, home=settings.home.with_name("other"), token=None)
    words = ("run", repo, "--model", tiny_decoder, "--prompt", "hello", "--max-new-tokens", "3")
    assert hubaoti(stranger, *words).code == 4
    done = hubaoti(stranger, *words, "--trust", "--isolate")
    assert done.code == 0, done
    assert "graphs answered 6 calls" in done.err
    done = hubaoti(stranger, "run", repo, "--model", tiny_decoder, "--text", "hello")
    assert done.code == 2 and "answers prompts: --prompt" in done.err


def test_a_file_is_answered_in_its_order(
    built_at: Settings, model: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    done = run(built_at, model, "--file", prompts, "--out", out)
    assert done.code == 0, done
    assert f"{COUNT} answers in {out}" in done.err
    assert "tokens/s" in done.err
    found = lines_of(out)
    assert [line["line"] for line in found] == [*range(1, COUNT + 1)]
    assert [line.get("id") for line in found][:2] == ["p0", "p1"]
    assert [line["prompt"] for line in found][-2:] == ["just a text", "with more"]
    assert {line["tokens"] for line in found} == {3}
    before = out.read_bytes()
    again = json.loads(run(built_at, model, "--file", prompts, "--out", out, "--json").out)
    assert (again["answered_before"], again["tokens"]) == (COUNT, 0)
    assert out.read_bytes() == before


@pytest.mark.parametrize("cut", [0, 1, 40, 2000])
def test_what_is_left_of_a_line_is_answered_again(
    cut: int, built_at: Settings, model: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    with LightweightEngine(built_at) as engine:
        engine.load(model)
        words = {"max_new_tokens": 3, "do_sample": False}

        def answered() -> batch_file.BatchProgress:
            return batch_file.answer_file(engine, str(model), prompts, out, words, lambda _: None)

        answered()
        whole = out.read_bytes()
        out.write_bytes(whole[: len(whole) - cut])
        kept = out.read_bytes().count(b"\n")
        done = answered()
    assert out.read_bytes() == whole
    assert (done.before, done.tokens) == (kept, 3 * (COUNT - kept))


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(
    built_at: Settings, model: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "many.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps(f"hello {at}") + "\n" for at in range(400)))
    words = ["run", "--model", model, "--file", prompts, "--out", out, "--max-new-tokens", "20"]
    for _ in range(2):
        had = out.read_bytes().count(b"\n") if out.exists() else 0
        process = subprocess.Popen(
            [HUBAOTI, *map(str, words)],
            env=environment_of(built_at),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not out.exists() or out.read_bytes().count(b"\n") <= had:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    some = out.read_bytes()
    assert 0 < some.count(b"\n") < 400
    done = hubaoti(built_at, *words)
    assert done.code == 0, done
    assert out.read_bytes().startswith(some[: some.rfind(b"\n") + 1])
    assert [line["line"] for line in lines_of(out)] == [*range(1, 401)]


def test_a_prompt_that_is_too_long_is_said_before_any_is_answered(
    built_at: Settings, model: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    with prompts.open("a") as file:
        file.write(json.dumps("word " * 70) + "\n")
    done = run(built_at, model, "--file", prompts, "--out", out)
    assert done.code == OutOfBounds.exit_code
    assert f"prompt {COUNT + 1} " in done.err
    assert out.read_bytes() == b""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Input data was truncated"),
        ('{"text": "x", "n": 3}', "it has no prompt and no messages, only text, n"),
        ("{}", "it has no prompt and no messages, nothing"),
        ('{"prompt": 3}', "Expected `str | array`, got `int`"),
        ("[1]", "it is neither a text nor an object"),
        ("3", "it is neither a text nor an object"),
        ('{"prompt": "x", "id": []}', "Expected `int | str | null`, got `array`"),
        ("\xff", "JSON is malformed"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_with_what_is_wrong(
    line: str, said: str, prompts: Path
) -> None:
    with prompts.open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    with pytest.raises(BadRequest) as caught:
        batch_file.read_prompt_file(prompts)
    assert f"line {COUNT + 2} is no prompt: {said}" in str(caught.value)
    assert "Error" not in str(caught.value)


def test_progress_counts_the_prompts_of_the_file_or_nothing_yet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with prompts_of_cli._show_progress_bar(False):
        pass
    assert "/" not in capsys.readouterr().err
    with prompts_of_cli._show_progress_bar(False) as show:
        show(batch_file.BatchProgress(0, 3, 0, 0, 0.0))
    assert "0/3" in capsys.readouterr().err


def test_files_that_are_none_are_said_so(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(BadRequest, match="no prompt"):
        batch_file.read_prompt_file(tmp_path / "empty")
    with pytest.raises(BadRequest, match="cannot be read"):
        batch_file.read_prompt_file(tmp_path / "nothing")
    with (
        pytest.raises(BadRequest, match="cannot be written"),
        batch_file.open_answers(tmp_path / "no" / "folder"),
    ):
        pass


@pytest.mark.parametrize(
    "content",
    [
        b"important notes",
        b"important notes\n",
        b'{"precious": "data"}',
        b'{"precious": "data"}\n{"line":',
        ANSWER % (1, b"m", b"other", ASKED.digest.encode()),
        ANSWER % (1, b"n", b"hello 0", ASKED.digest.encode()),
        ANSWER % (2, b"m", b"hello 1", ASKED.digest.encode()),
        ANSWER % (1, b"m", b"hello 0", b"other sampling"),
        ANSWER % (1, b"m", b"hello 0", ASKED.digest.encode()) + b"notes",
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(
    content: bytes, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_bytes(content)
    lines = batch_file.read_prompt_file(prompts)
    with pytest.raises(OutputExists), batch_file.open_answers(out) as file:
        batch_file.count_answered(file, out, lines, ASKED)
    assert out.read_bytes() == content


def test_a_line_that_is_ours_is_cut_where_it_was_not_finished(
    prompts: Path, tmp_path: Path
) -> None:
    out, lines = tmp_path / "answers.jsonl", batch_file.read_prompt_file(prompts)
    whole = ANSWER % (1, b"m", b"hello 0", ASKED.digest.encode())
    for at in range(len(whole)):
        out.write_bytes(whole + whole[:at])
        with batch_file.open_answers(out) as file:
            assert batch_file.count_answered(file, out, lines, ASKED) == 1
        assert out.read_bytes() == whole


def test_each_batch_of_a_file_has_a_seed_of_its_own_and_the_same_after_a_stop(
    prompts: Path,
) -> None:
    lines = batch_file.read_prompt_file(prompts)
    whole = [[line.line for line in few] for few in batch_file.batch_remaining(0, lines)]
    assert [len(few) for few in whole] == [16, 16, 16, 12]
    rest = [[line.line for line in few] for few in batch_file.batch_remaining(20, lines)]
    assert rest == [whole[1][4:], *whole[2:]]
    seeds = {batch_file.BatchRequest("m", {"seed": 1}).make_kwargs(few[0])["seed"] for few in whole}
    assert len(seeds) == 4
    assert batch_file.BatchRequest("m", {}).make_kwargs(3) == {}


def test_answers_go_to_files_only(prompts: Path) -> None:
    with pytest.raises(BadRequest, match="no file"), batch_file.open_answers(Path("/dev/null")):
        pass


def test_two_runs_never_write_one_file(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    with out.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="another run"), batch_file.open_answers(out):
            pass


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "Give one of"),
        (("--prompt", "a", "--text", "b"), "Give one of"),
        (("--file", "x"), "--file without --out"),
        (("--prompt", "a", "--out", "x"), "--out without --file"),
        (("--text", "a", "--max-new-tokens", "3"), "--max-new-tokens is of prompts"),
        (("--text", "a"), "Missing argument 'REPO'"),
        (("--prompt", "a", "--eager", "--recipe", "x"), "--eager opens none"),
    ],
)
def test_words_that_do_not_belong_together_are_refused(
    words: tuple[str, ...], told: str, settings: Settings
) -> None:
    done = inside(settings, "run", "--model", ".", *words)
    assert done.code == 2
    assert told in done.err
