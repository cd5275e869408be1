"""The command line: each command as a stranger runs it, its exit codes, and how it ends early."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from bundles import CPU, make_bundle, tree_of
from commands import HUBAOTI, Done, environment_of, hubaoti, inside
from huggingface_hub import HfApi
from test_mirror_commands import at_most

from hubaoti import __version__, api, cli, errors
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.sizes import format_size
from hubaoti.cli import COMMANDS, dispatch
from hubaoti.cli.output import Steps, format_time, print_table
from hubaoti.host.build_tools import find_missing_build_tools
from hubaoti.host.extras import format_install
from hubaoti.host.probe import Torch
from hubaoti.hub.layout import RepoRef
from hubaoti.settings import Settings

BUILDING = Path(f"/tmp/hubaoti-build-{os.getuid()}/build")


@pytest.fixture
def env(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """This process, too, has the test's settings."""
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    return settings


@pytest.fixture
def repo(settings: Settings, tmp_path: Path) -> str:
    """A repo with one small artifact for hosts as this one, or nearly."""
    name = f"acme/{tmp_path.name}"
    make_bundle(tmp_path / "bundle")
    assert hubaoti(settings, "push", "--as-is", tmp_path / "bundle", name).code == 0
    return name


def refused(done: Done, kind: type[errors.HubaotiError], *words: str) -> None:
    """An error, a hint, the code of its kind, and nothing on standard output."""
    assert done.code == kind.exit_code, done
    assert done.out == ""
    assert "error: " in done.err
    assert "hint: " in done.err
    assert [word for word in words if word not in done.err] == []


@pytest.mark.parametrize("words", [["--help"], ["-h"], *([name, "--help"] for name in COMMANDS)])
def test_every_command_has_help(
    words: list[str], capsys: pytest.CaptureFixture[str], env: Settings
) -> None:
    assert dispatch(words) == 0
    said = capsys.readouterr().out
    assert "Usage: hubaoti" in said
    if words[0] in COMMANDS:
        assert len(said.splitlines()) > 4


def test_help_lists_every_command_in_the_order_of_the_road(env: Settings) -> None:
    said = hubaoti(env, "--help").out
    places = [said.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)


def test_the_version_is_that_of_the_package(env: Settings) -> None:
    assert hubaoti(env, "--version").out.split() == ["hubaoti,", "version", __version__]


@pytest.mark.parametrize(
    "words",
    [
        ["fly"],
        ["compile"],
        ["compile", "model"],
        ["push", "x"],
        ["run", "a/b"],
        ["serve", "--port", "x"],
        ["mirror", "mv"],
        ["pull", "--fast", "a/b"],
    ],
)
def test_bad_usage_ends_with_2(
    words: list[str], capsys: pytest.CaptureFixture[str], env: Settings
) -> None:
    assert dispatch(words) == 2
    said = capsys.readouterr()
    assert "Usage: hubaoti" in said.err
    assert said.out == ""


def test_a_command_that_is_nearly_one_is_told(
    capsys: pytest.CaptureFixture[str], env: Settings
) -> None:
    for word, meant in (("pul", "pull"), ("verfiy", "verify"), ("docter", "doctor")):
        assert dispatch([word]) == 2
        assert f"No such command '{word}'. Did you mean '{meant}'?" in capsys.readouterr().err
    assert dispatch(["fly"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_doctor_says_what_artifacts_are_judged_by(env: Settings) -> None:
    table = inside(env, "doctor").out
    facts = json.loads(inside(env, "doctor", "--json").out)
    for name in ("torch", "glibc", "driver", "CPU", "endpoint", "mirror"):
        assert f"\n{name} " in table
    assert facts["level"] in table
    assert str(facts["glibc"]) in table
    assert facts["endpoint"] == env.endpoint
    assert tree_of(env.home.parent) == {}, "doctor changes nothing"


def test_doctor_says_what_is_missing_to_compile_and_how_to_get_it(
    env: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    table = inside(env, "doctor", "--build")
    listed = inside(env, "doctor", "--build", "--json")
    missing = json.loads(listed.out)
    assert table.code == listed.code == errors.MissingDependency.exit_code
    assert f"error: {len(missing)} missing" in table.err and len(missing) >= 4
    assert all(each["need"] and each["have"] and each["advice"] for each in missing)
    (compiler,) = [each for each in missing if each["need"].startswith("g++")]
    assert compiler["need"] in table.out and compiler["advice"] in table.out
    cpu, gpu = table.out.split("missing to compile for a GPU:\n")
    assert cpu.startswith("missing to compile for this CPU:\n") and compiler["advice"] in cpu
    assert len(cpu.splitlines()) == 3 and len(gpu.splitlines()) == len(missing) + 1
    monkeypatch.setattr("hubaoti.cli.doctor.find_missing_build_tools", lambda torch: [])
    nothing = inside(env, "doctor", "--build")
    assert (nothing.code, nothing.err) == (0, "")
    assert nothing.out.endswith("nothing is missing to compile for a GPU\n")
    nothing = inside(env, "doctor", "--build", "--json")
    assert (nothing.code, json.loads(nothing.out)) == (0, [])


def test_doctor_says_for_the_cpu_too_whether_all_is_there(
    env: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = partial(find_missing_build_tools, Torch("2.13.0+cpu", None, None, Path()))
    monkeypatch.setattr("hubaoti.cli.doctor.find_missing_build_tools", lambda _: without())
    monkeypatch.setattr("hubaoti.host.build_tools.shutil.which", lambda name: name)
    table = inside(env, "doctor", "--build")
    assert table.code == errors.MissingDependency.exit_code
    assert table.out.startswith("nothing is missing to compile for this CPU\nmissing to compile")
    assert "a torch that is built with CUDA" in table.out
    monkeypatch.setattr("hubaoti.host.extras.package_version", lambda _: None)
    table = inside(env, "doctor", "--build")
    assert "compiling needs torch and transformers, which are not installed" in table.out
    assert format_install("compile") in table.out


def test_push_and_pull_say_what_they_did(env: Settings, tmp_path: Path) -> None:
    repo = f"acme/{tmp_path.name}"
    make_bundle(tmp_path / "bundle")
    first = inside(env, "push", "--as-is", tmp_path / "bundle", repo, "--tag", "v1")
    again = inside(env, "push", "--as-is", tmp_path / "bundle", repo)
    assert (first.code, again.code) == (0, 0)
    assert "float32-sdpa/" in first.out and "published" in first.out
    assert "was there already" in again.out
    pulled = inside(env, "pull", f"{repo}@v1", "--trust")
    assert pulled.code == 0, pulled
    assert "from the Hub" in pulled.out
    assert "from the mirror" in inside(env, "pull", f"{repo}@v1").out


def test_several_bundles_are_pushed_as_the_shell_lists_them(env: Settings, tmp_path: Path) -> None:
    repo = f"acme/{tmp_path.name}"
    levels = ("x86_64_v2", "x86_64_v3")
    made = [make_bundle(tmp_path / each, {**CPU, "level": each}).path for each in levels]
    first = inside(env, "push", "--as-is", made[0], repo)
    both = inside(env, "push", "--as-is", *made, repo, "--tag", "v1")
    assert (first.code, both.code) == (0, 0), both
    head, *lines = both.out.splitlines()
    assert head.endswith(": 2 artifacts")
    assert "x86_64_v2-linux was there already" in lines[0]
    assert "x86_64_v3-linux published" in lines[1]
    assert inside(env, "pull", f"{repo}@v1", "--trust").code == 0


def test_a_commit_is_printed_so_that_no_branch_poses_as_it(env: Settings, tmp_path: Path) -> None:
    repo, api = f"acme/{tmp_path.name}", HfApi(env.endpoint, token=env.token)
    make_bundle(tmp_path / "bundle")
    pushed = inside(env, "push", "--as-is", tmp_path / "bundle", repo, "--tag", "v1")
    named = pushed.out.split(":")[0]
    commit = RepoRef.parse(named).commit
    assert commit == api.repo_info(repo).sha
    api.upload_file(path_or_fileobj=b"x", path_in_repo="later.txt", repo_id=repo)
    api.create_branch(repo, branch=commit[:12])
    assert json.loads(inside(env, "pull", named, "--trust", "--json").out)["commit"] == commit
    said = [pushed, inside(env, "pull", f"{repo}@v1"), inside(env, "mirror", "ls")]
    for done in said:
        found = re.findall(rf"\b{commit[:12]}[0-9a-f]*", done.out + done.err)
        assert found and {*found} == {commit}
    other = inside(env, "pull", f"{repo}@{commit[:12]}")
    assert f"{commit[:12]} is the name of a branch or a tag here" in other.err


def test_pull_as_json_says_what_was_chosen_among_what(env: Settings, repo: str) -> None:
    done = inside(env, "pull", repo, "--trust", "--json")
    facts = json.loads(done.out)
    assert done.err == ""
    assert facts["verdict"]["fit"] in {"exact", "compatible"}
    assert [each["path"] for each in facts["considered"]] == [facts["path"]]
    assert Path(facts["folder"]).is_dir()


def test_pull_as_json_says_in_words_what_went_wrong(env: Settings, repo: str) -> None:
    refused(inside(env, "pull", repo, "--json"), errors.Untrusted, "acme is not trusted here")
    refused(inside(env, "pull", "acme/nowhere", "--json"), errors.RepoNotFound)


def test_pull_mentions_a_manifest_that_it_could_not_use(env: Settings, tmp_path: Path) -> None:
    repo, odd = f"acme/{tmp_path.name}", "float32-sdpa/torch2.13-cpu-x86_64_v3-linux"
    lower = make_bundle(tmp_path / "bundle", {**CPU, "level": "x86_64_v2"})
    api.push(lower, repo, as_is=True, settings=env)
    HfApi(env.endpoint, token=env.token).upload_file(
        path_or_fileobj=b"{}", path_in_repo=f"{odd}/hubaoti.json", repo_id=repo
    )
    done = inside(env, "pull", repo, "--trust")
    assert done.code == 0, done
    assert f"  {odd} cannot be used: " in done.out


@pytest.mark.parametrize("option", [["--recipe", "float32-sdpa"], ["--device", "cpu"]])
def test_eager_refuses_what_is_of_a_graph(env: Settings, option: list[str]) -> None:
    words = ["run", "acme/x", "--model", ".", "--text", "x", "--eager"]
    refused(inside(env, *words, *option), errors.BadRequest, option[0], "--eager")


@pytest.mark.parametrize(
    ("command", "option", "said"),
    [
        ("push", "--move-tag", "move an existing tag to this commit"),
        ("push", "--replace", "overwrite the artifact at this path"),
        ("compile", "--task TEXT", "embed, classify, logits, generate or forward; default: from"),
        ("compile", "--dim NAME=MIN:MAX[:STEP]", "as batch=1:32, or seq=20:20 for one size"),
    ],
)
def test_help_says_what_an_option_does(command: str, option: str, said: str, env: Settings) -> None:
    assert f" {option} {said}" in " ".join(inside(env, command, "--help").out.split())


@pytest.mark.parametrize(
    "words",
    [
        "push -q --as-is {bundle} {repo}",
        "pull -q --trust {repo}",
        "lock -q -o {bundle}.lock {repo}",
        "verify -q {bundle}",
        "versions -q {repo}",
        "explain -q {repo}",
        "search -q acme",
        "pull -q --json --trust {repo}",
        "verify -q --json {bundle}",
    ],
)
def test_quiet_prints_what_its_help_says(
    words: str, env: Settings, repo: str, tmp_path: Path
) -> None:
    done = inside(env, *words.format(bundle=tmp_path / "bundle", repo=repo).split())
    said = " ".join(inside(env, words.split()[0], "--help").out.split())
    assert done.code == 0 and done.err == ""
    if "-q, --quiet print nothing but errors" in said:
        assert bool(done.out) == ("--json" in words)
        assert ("--json is printed all the same" in said) == ("--json" in said)
    else:
        assert "-q, --quiet print the result alone, and no steps" in said and done.out


def test_quiet_is_silent(env: Settings, repo: str, tmp_path: Path) -> None:
    for words in (["push", "--as-is", tmp_path / "bundle", repo], ["pull", repo, "--trust"]):
        done = inside(env, *words, "--quiet")
        assert (done.code, done.out, done.err) == (0, "", "")


def test_the_mirror_lists_what_was_pulled(env: Settings, repo: str) -> None:
    empty = inside(env, "mirror", "ls")
    assert (empty.code, len(empty.out.splitlines())) == (0, 1)
    assert json.loads(inside(env, "mirror", "ls", "--json").out) == []
    inside(env, "pull", repo, "--trust")
    table = inside(env, "mirror", "ls").out
    (row,) = json.loads(inside(env, "mirror", "ls", "--json").out)
    assert row["origin"]["repo"] == repo
    assert repo in table and row["digest"][:12] in table and "float32-sdpa" in table


def test_what_is_stored_is_told_apart_by_its_model_and_task(env: Settings, repo: str) -> None:
    inside(env, "pull", repo, "--trust")
    (row,) = json.loads(inside(env, "mirror", "ls", "--json").out)
    head, line = inside(env, "mirror", "ls").out.splitlines()
    assert head.split()[:2] == ["model", "task"]
    assert line.split()[:2] == [row["model"], row["task"]]
    manifest = env.mirror / "artifacts" / row["digest"] / "hubaoti.json"
    facts = json.loads(manifest.read_text())
    assert (row["model"], row["task"]) == (facts["source"]["model"], facts["program"]["task"])
    manifest.chmod(0o644)
    manifest.write_text("{}")  # what it said is known by its digest, and is listed as before
    assert json.loads(inside(env, "mirror", "ls", "--json").out) == [row]


def test_trust_is_listed_and_taken_back(env: Settings, repo: str) -> None:
    assert json.loads(inside(env, "trust", "ls", "--json").out) == []
    told = inside(env, "pull", repo, "--trust").out
    assert f"acme at {env.endpoint} is trusted from now on" in told and f"  {repo} at " in told
    assert "from now on" not in inside(env, "pull", repo, "--trust").out
    assert "acme" in inside(env, "trust", "ls").out
    (publisher,) = json.loads(inside(env, "trust", "ls", "--json").out)
    assert (publisher["owner"], publisher["endpoint"]) == ("acme", env.endpoint)
    assert publisher["is"] == "trusted"
    assert "no longer trusted" in inside(env, "trust", "rm", "acme").out
    refused(inside(env, "pull", repo), errors.Untrusted, "acme")
    refused(inside(env, "trust", "rm", "acme"), errors.BadRequest, "trust ls")
    assert "is trusted" in inside(env, "trust", "add", "acme").out
    assert "acme" in inside(env, "trust", "ls").out
    assert "is blocked" in inside(env, "trust", "block", "acme").out
    refused(inside(env, "pull", repo, "--trust"), errors.Blocked, "acme")
    assert "blocked" in inside(env, "trust", "ls").out
    refused(inside(env, "trust", "add", "../acme"), errors.BadRequest, "first part")


def test_an_untrusted_publisher_is_named_and_nothing_is_kept(env: Settings, repo: str) -> None:
    done = inside(env, "pull", repo)
    refused(done, errors.Untrusted, "acme", repo, env.endpoint, "--trust")
    assert json.loads(inside(env, "mirror", "ls", "--json").out) == []


def test_a_bundle_that_was_edited_is_not_pushed(env: Settings, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "golden.safetensors").write_bytes(b"other")
    done = inside(env, "push", "--as-is", tmp_path / "bundle", f"acme/{tmp_path.name}")
    refused(done, errors.DigestMismatch, "golden.safetensors")


def test_a_newer_manifest_is_told_from_a_bad_one(env: Settings, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    file = bundle.path / "hubaoti.json"
    file.write_bytes(file.read_bytes().replace(b'"schema":1', b'"schema":7'))
    refused(
        inside(env, "push", "--as-is", bundle.path, "acme/x"), errors.NewerSchema, "upgrade hubaoti"
    )
    file.write_bytes(b"{}")
    refused(inside(env, "push", "--as-is", bundle.path, "acme/x"), errors.BadManifest)


def test_an_artifact_for_another_host_is_refused_with_every_reason(
    env: Settings, tmp_path: Path
) -> None:
    target = CPU | {"torch": "2.9.0+cpu"}
    make_bundle(tmp_path / "bundle", target=target)
    repo = f"acme/{tmp_path.name}"
    inside(env, "push", "--as-is", tmp_path / "bundle", repo)
    refused(inside(env, "pull", repo, "--trust"), errors.NoMatch, "torch2.9", "needs ")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["pull", "acme"], errors.BadRequest),
        (["pull", "acme/nowhere"], errors.RepoNotFound),
        (["run", "acme/nowhere", "--model", ".", "--text", "x"], errors.RepoNotFound),
        (["push", ".", "acme/x"], errors.BadManifest),
        (["compile", "acme/nowhere", "-o", "out"], errors.ModelNotFound),
        (["compile", ".", "-o", "out"], errors.ModelNotFound),
        (["compile", ".", "-o", "out", "--task", "fly"], errors.UnknownTask),
        (["compile", ".", "-o", "out", "--dim", "seq=5:4"], errors.BadDim),
        (["compile", ".", "-o", "out", "--dtype", "int3"], errors.BadRequest),
    ],
)
def test_what_cannot_be_done_leaves_nothing(
    words: list[str],
    kind: type[errors.HubaotiError],
    capsys: pytest.CaptureFixture[str],
    env: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    code = dispatch(words)
    said = capsys.readouterr()
    refused(Done(code, said.out, said.err.replace("\n  ", "")), kind)
    assert list(here.iterdir()) == []


def test_a_wrong_token_and_no_token_are_told(env: Settings, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    for token in ("wrong", None):
        done = inside(
            replace(env, token=token), "push", "--as-is", tmp_path / "bundle", "acme/x-token"
        )
        refused(done, errors.AuthFailed, "oken")


def test_an_endpoint_that_is_down_is_told(env: Settings, tmp_path: Path) -> None:
    down = replace(env, endpoint="http://127.0.0.1:9")
    refused(inside(down, "pull", "acme/x"), errors.HubUnreachable, "127.0.0.1:9")


def test_a_home_that_others_may_write_is_refused(env: Settings, repo: str) -> None:
    env.mirror.mkdir(parents=True, mode=0o700, exist_ok=True)
    env.mirror.chmod(0o777)
    for words in (["mirror", "ls"], ["pull", repo, "--trust"]):
        refused(inside(env, *words), errors.UnsafeFolder, "chmod", str(env.mirror))


def test_a_home_that_is_a_file_is_refused_in_words(tmp_path: Path, env: Settings) -> None:
    (tmp_path / "file").write_text("")
    done = inside(replace(env, home=tmp_path / "file"), "mirror", "ls")
    assert done.code not in {0, 130}
    assert "error: " in done.err


@pytest.mark.parametrize("words", [["doctor"], ["doctor", "--json"], ["--help"], ["mirror", "ls"]])
def test_a_reader_that_leaves_is_not_told_about_it(words: list[str], env: Settings) -> None:
    """As in `hubaoti doctor | find_head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [HUBAOTI, *words], env=environment_of(env), stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def compiler_runs(session: int) -> bool:
    """Whether a C++ compiler works in a session of processes."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().partition("(")[2].rsplit(")", 1)
        except OSError:
            continue  # it ended
        if name == "cc1plus" and int(rest.split()[3]) == session:
            return True
    return False


def test_an_interrupted_compile_leaves_nothing(
    env: Settings, tiny_llama: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "bundle"
    output.parent.mkdir()
    working = subprocess.Popen(
        [HUBAOTI, "compile", tiny_llama, "-o", output, "--dim", "seq=2:16"],
        env=environment_of(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 300  # another compile of this user has its turn before
    while not compiler_runs(working.pid):
        assert working.poll() is None and time.monotonic() < until, "g++ never ran"
        time.sleep(0.02)
    assert list(output.parent.iterdir()), "the scratch folder stands beside the output"
    os.killpg(working.pid, signal.SIGINT)  # as a terminal does
    out, err = working.communicate(timeout=60)
    assert working.returncode == 130, err
    assert out == ""
    assert "interrupted; nothing half-written was left" in err
    assert "Traceback" not in err
    assert list(output.parent.iterdir()) == []
    with BUILDING.with_name("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another compile of this user may have its turn
        assert not BUILDING.exists()
    until = time.monotonic() + 10
    while compiler_runs(working.pid):  # it was told, too, and ends on its own
        assert time.monotonic() < until, "g++ outlived the compile"
        time.sleep(0.02)


def test_a_stopped_compile_leaves_nothing(env: Settings, tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "bundle"
    output.parent.mkdir()
    working = subprocess.Popen(
        [HUBAOTI, "compile", tiny_llama, "-o", output],
        env=environment_of(env),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(output.parent.iterdir()):
        assert working.poll() is None
        time.sleep(0.02)
    working.terminate()  # as a scheduler does
    assert "Traceback" not in working.communicate(timeout=60)[1]
    assert working.returncode == 143
    assert list(output.parent.iterdir()) == []


def noexec(path: Path) -> bool:
    """Mount a disk from which no code may run."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "noexec,mode=700", "tmpfs", str(path)]
    return subprocess.run(mount, capture_output=True).returncode == 0


def test_a_disk_that_does_not_allow_code_is_told(
    env: Settings, roberta_bundle: Bundle, tiny_roberta: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    if not noexec(disk):
        pytest.skip("mounting a noexec disk is not permitted here")
    try:
        there = replace(env, home=disk / "home")
        repo = f"acme/{tmp_path.name}"
        assert hubaoti(there, "push", "--as-is", roberta_bundle.path, repo).code == 0
        words = ["run", repo, "--trust", "--model", tiny_roberta, "--text", "cat"]
        refused(hubaoti(there, *words), errors.CannotOpen, "noexec", "HUBAOTI_HOME")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_run_prints_answers_as_words_and_as_json(
    env: Settings, roberta_bundle: Bundle, tiny_roberta: Path, tmp_path: Path
) -> None:
    repo = f"acme/{tmp_path.name}"
    assert hubaoti(env, "push", "--as-is", roberta_bundle.path, repo).code == 0
    words = ["run", repo, "--model", tiny_roberta, "--text", "a cat", "--text", "rates rose"]
    refused(hubaoti(env, *words), errors.Untrusted)
    done = hubaoti(env, *words, "--trust")
    assert done.code == 0, done
    assert "a cat: [3] [" in done.out and "rates rose: [3] [" in done.out
    assert "open" in done.err
    quiet = hubaoti(env, *words, "--quiet")
    assert (quiet.err, quiet.out) == ("", done.out)
    ours = json.loads(hubaoti(env, *words, "--json").out)
    eager = json.loads(hubaoti(env, *words, "--json", "--eager").out)
    assert (ours["task"], ours["texts"]) == ("classify", ["a cat", "rates rose"])
    pairs = zip(ours["values"], eager["values"], strict=True)
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in pairs)
    refused(hubaoti(env, *words, "--text", "cat " * 80), errors.OutOfBounds, "82 tokens")
    assert inside(env, "trust", "rm", "acme").code == 0
    refused(hubaoti(env, *words), errors.Untrusted, "acme is not trusted here")


def test_run_without_weights_or_tokenizer_says_what_is_missing(
    env: Settings,
    roberta_bundle: Bundle,
    tiny_roberta: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repo, model = f"acme/{tmp_path.name}", tmp_path / "model"
    model.mkdir()
    hubaoti(env, "push", "--as-is", roberta_bundle.path, repo)
    words = ["run", repo, "--trust", "--model", str(model), "--text", "x"]
    for missing, kind in (
        ("model.safetensors", errors.MissingConstant),
        ("tokenizer.json", errors.ModelNotFound),
    ):
        assert dispatch(words) == kind.exit_code
        assert f"has no {missing}" in capsys.readouterr().err
        (model / missing).write_bytes((tiny_roberta / missing).read_bytes())
    assert dispatch(words) == 0
    assert "x: [3] [" in capsys.readouterr().out


def test_similarity_is_printed_for_the_vectors_of_some_texts(
    env: Settings,
    minilm_bundle: Bundle,
    minilm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repo = f"acme/{tmp_path.name}"
    hubaoti(env, "push", "--as-is", minilm_bundle.path, repo)
    words = ["run", repo, "--trust", "--model", str(minilm)]
    words += ["--text", "a cat", "--text", "a kitten"]
    assert dispatch(words) == 0
    said = capsys.readouterr().out
    assert "a kitten" in said and "1.000" in said
    assert dispatch(words[:-2]) == 0
    assert "a cat: [384] [" in capsys.readouterr().out


def test_compile_says_what_it_made(
    env: Settings,
    roberta_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The words only: the compiler itself is replaced by a fake that gives a made bundle."""

    def fake(*_: object, progress: Steps, **asked: object) -> Bundle:
        assert asked["dims"] == ("seq=2:64",)
        progress("compile")
        return roberta_bundle

    monkeypatch.setattr("hubaoti.api.compile", fake)
    words = ["compile", "m", "-o", "out", "--dim", "seq=2:64"]
    assert dispatch(words) == 0
    said = capsys.readouterr()
    assert "float32-sdpa for torch" in said.out and "checks against eager" in said.out
    assert "compile" in said.err
    assert dispatch([*words, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert (quiet.out, quiet.err) == ("", "")
    assert dispatch([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["key"] == roberta_bundle.manifest.key


def test_serve_prints_how_to_use_it_and_ends_with_a_signal(env: Settings) -> None:
    serving = subprocess.Popen(
        [HUBAOTI, "serve", "--port", "0"],
        env=environment_of(env) | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert serving.stdout is not None
    where, export = serving.stdout.readline(), serving.stdout.readline()
    assert "--token-file" in serving.stdout.readline()  # by which the next start has the same
    url, token = (word.split("=")[1] for word in export.split()[1:])
    assert url in where
    there = replace(env, endpoint=url, token=token)
    make_bundle(env.home.parent / "bundle")
    assert hubaoti(there, "push", "--as-is", env.home.parent / "bundle", "acme/served").code == 0
    serving.send_signal(signal.SIGINT)
    assert "Traceback" not in serving.communicate(timeout=30)[1]


def test_an_error_without_a_hint_prints_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], env: Settings
) -> None:
    def fake(*_: object, **__: object) -> None:
        raise errors.HubaotiError("it broke")

    monkeypatch.setattr("hubaoti.api.pull", fake)
    assert dispatch(["pull", "a/b"]) == 1
    assert capsys.readouterr().err == "error: it broke\n"


def test_what_nobody_foresaw_is_said_in_words_and_kept_whole_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    env: Settings,
    tmp_path: Path,
) -> None:
    def fake(*_: object, **__: object) -> None:
        raise KeyError("Bearer hf_abcdefghijklm to https://me:secret@hub.example\nand more\x1b[31m")

    monkeypatch.setattr("hubaoti.api.pull", fake)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-kind")
    assert dispatch(["pull", "a/b"]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: unexpected KeyError: ")
    assert "\x1b" not in error
    assert "secret" not in error and "hf_abcdef" not in error
    (file,) = tmp_path.glob("hubaoti-error-*.txt")
    assert str(file) in hint
    assert file.stat().st_mode & 0o077 == 0, "nobody else's"
    kept = file.read_text()
    assert kept.startswith("Traceback ") and 'raise KeyError("Bearer' in kept
    assert "hf_abcdef" not in kept and "me:secret" not in kept


def test_what_nobody_foresaw_is_said_even_where_no_file_can_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], env: Settings
) -> None:
    def fake(*_: object, **__: object) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr("hubaoti.api.pull", fake)
    monkeypatch.setattr("tempfile.tempdir", "/dev/null")
    assert dispatch(["pull", "a/b"]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: unexpected RuntimeError: it broke"
    assert hint.startswith("hint: its traceback could not be written: ")


@pytest.mark.parametrize("words", [["doctor"], ["--help"], ["mirror", "ls"]])
def test_a_full_disk_below_what_is_printed_is_told(words: list[str], env: Settings) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [HUBAOTI, *words],
            env=environment_of(env),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == errors.DiskFull.exit_code
    assert done.stderr.splitlines()[0].startswith("error: what is printed has no room: ")
    assert "Traceback" not in done.stderr


def test_main_ends_the_process_with_the_code(env: Settings) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["trust", "rm", "nobody"])
    assert ended.value.code == 2


def test_each_step_is_printed_with_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps() as progress:
        progress("one")
        progress("two")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["one", "two"]
    assert all(line.endswith("s") for line in lines)
    with pytest.raises(ZeroDivisionError), Steps() as progress:
        progress("three")
        _ = 1 / 0
    assert capsys.readouterr().err.split() == ["three", "stopped"]
    with Steps(quiet=True) as progress:
        progress("four")
    assert capsys.readouterr().err == ""


def test_a_table_in_a_pipe_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    print_table(["name", "value"], [("[bold]", long)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "[bold]" in lines[1] and long in lines[1]


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (None, "unknown"),
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (2_000_000, "2.0 MB"),
        (3e9, "3.0 GB"),
        (4e12, "4.0 TB"),
    ],
)
def test_a_size_is_in_the_unit_that_a_person_would_say(size: float | None, words: str) -> None:
    assert format_size(size) == words


def test_a_time_is_in_the_unit_that_a_person_would_say() -> None:
    assert [format_time(each) for each in (0.0012, 0.4, 0.5, 61)] == [
        "1.2 ms",
        "400.0 ms",
        "0.5 s",
        "61.0 s",
    ]


@pytest.mark.parametrize("words", [["doctor"], ["--help"], ["mirror", "ls"], ["trust", "add", "x"]])
def test_where_output_is_closed_nothing_is_done_and_that_is_said(
    words: list[str], env: Settings
) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" >&-', "sh", str(HUBAOTI), *words],
        env=environment_of(env),
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output is closed")
    assert "hint: " in done.stderr and not env.trust.exists()


@pytest.mark.parametrize(
    "words",
    ["verify {}", "mirror import {}", "mirror import {}.tar", "trust keygen {}", "trust add {}"],
)
def test_a_name_that_is_too_long_is_said(words: str, env: Settings) -> None:
    done = inside(env, *words.format("x" * 300).split())
    assert done.code == 2 and "no disk takes a name as long as" in done.err
    assert "hint: " in done.err and len(done.err) < 300


@pytest.mark.parametrize(
    "words",
    [
        ["mirror", "import", ""],
        ["mirror", "stats", "--misses", ""],
        ["push", "", "acme/x"],
        ["verify", ""],
        ["trust", "keygen", ""],
        ["compile", "x", "-o", ""],
    ],
    ids=lambda words: words[-3:][0],
)
def test_an_empty_name_is_not_the_folder_that_we_are_in(
    words: list[str], env: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert inside(env, *words).code == 2


@pytest.mark.parametrize(
    "words",
    [
        "trust add bob --key",
        "trust add bob --identity bob --root",
        "mirror stats --misses",
        "compile x --from-misses",
        "push {} acme/x --as-is --sign",
    ],
)
@pytest.mark.parametrize("kind", ["device", "pipe", "sparse"])
def test_of_what_never_ends_nothing_is_read(
    words: str, kind: str, env: Settings, tmp_path: Path
) -> None:
    file = Path("/dev/zero") if kind == "device" else tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(file)
    if kind == "sparse":
        file.touch()
        os.truncate(file, 20 << 30)
    make_bundle(tmp_path / "bundle")
    with at_most(20.0):
        done = inside(env, *words.format(tmp_path / "bundle").split(), file)
    refused(done, errors.BadRequest, "larger" if kind == "sparse" else "a pipe or a device")
