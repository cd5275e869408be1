"""Spaces: planned where there is no GPU, opened by each worker for itself, nothing left behind."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bundles import CUDA, changed, make_gpu_host, make_host
from commands import environment_of
from huggingface_hub import HfApi, snapshot_download
from signals import struck
from space import Net, X, net
from torch import nn

import hubaoti
import hubaoti.spaces
from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.package import pack_folder
from hubaoti.artifact.requirements import Requirements
from hubaoti.attachment.stats import Fallback
from hubaoti.errors import (
    AlreadyAttached,
    BadRequest,
    MissingConstant,
    NoArtifact,
    NoMatch,
    NotServed,
    OtherProgram,
    Untrusted,
)
from hubaoti.host.probe import Gpu
from hubaoti.hub.pull_all import judge_without_gpu
from hubaoti.mirror import Mirror
from hubaoti.mirror.trust import Trust
from hubaoti.settings import Settings
from hubaoti.spaces.unsigned.fetch import NoDigests
from hubaoti.spaces.unsigned.load import describe_misfit
from hubaoti.spaces.worker import build_worker_host

SPACE = Path(__file__).with_name("space.py")
PLACE = "float32-native/torch2.13-cpu-x86_64_v3-linux"
BRANCH = f"zerogpu/{PLACE}"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def blocks(built_at: Settings, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The blocks of the net, which share one graph."""
    return compiled(tmp_path_factory.mktemp("blocks") / "bundle", built_at)


@pytest.fixture(scope="module")
def whole(built_at: Settings, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The net as one graph."""
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    return compiled(folder, built_at, regions="none")


def compiled(folder: Path, settings: Settings, **how: Any) -> Bundle:
    module = net()
    with hubaoti.capture(module) as calls, torch.no_grad():
        for shape in ((2, 5, 8), (3, 7, 8)):
            module(torch.randn(shape))
    return api.compile(module, folder, calls=calls, layout="zerogpu", settings=settings, **how)


@pytest.fixture
def repo_of_blocks(blocks: Bundle, repo: str, settings: Settings) -> str:
    api.push(blocks, repo, as_is=True, settings=settings)
    return repo


def play(
    settings: Settings,
    scene: str,
    repo: str,
    *,
    main: str = "",
    more: dict[str, str] | None = None,
    **how: Any,
) -> Any:
    """A scene of a Space, in a process without a GPU; `main` is its `SPACES_ZERO_GPU`."""
    temporary = settings.home.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    gone = {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(temporary), "SPACES_ZERO_GPU": main}
    done = subprocess.run(
        [sys.executable, SPACE, scene, repo, json.dumps(how)],
        env=environment_of(settings) | gone | (more or {}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Workers


def test_workers_answer_by_graphs_that_each_opens_for_itself(
    repo_of_blocks: str, settings: Settings
) -> None:
    told = play(settings, "few", repo_of_blocks)
    answers = [*told["workers"], told["main"], told["after"]]
    assert max(answer["off"] for answer in answers) < 1e-6
    # Nobody knows this module: one call is answered by it, and compared, for all workers.
    counts = [(each["stats"]["compiled"], each["stats"]["eager"]) for each in answers]
    assert counts == [(3, 0), (6, 0), (6, 0), (3, 0), (3, 0)]
    assert len({answer["stats"]["process"]["pid"] for answer in answers}) == 5
    assert all(answer["stats"]["process"]["open"] for answer in answers)
    assert told["clean"]
    assert told["regions"] == []


def test_the_main_process_of_a_zerogpu_space_opens_nothing(
    repo_of_blocks: str, settings: Settings
) -> None:
    told = play(settings, "few", repo_of_blocks, main="true")
    main = told["main"]["stats"]
    assert (main["compiled"], main["eager"], main["process"]["open"]) == (0, 3, False)
    assert main["regions"]["blocks.0"]["eager"] == {"main": 1}
    assert [each["stats"]["compiled"] for each in told["workers"]] == [3, 6, 6]


@pytest.mark.slow
def test_fifty_workers_in_a_row_leave_no_file_no_process_and_no_growth(
    repo_of_blocks: str, settings: Settings
) -> None:
    told = play(settings, "fifty", repo_of_blocks)
    assert told["new"] == []
    assert told["left"] == []
    assert told["grown"] < 8 << 20
    with Mirror.open(settings.mirror) as mirror:
        assert mirror.ls()
    assert [path.name for path in settings.mirror.glob("index*")] == ["index.sqlite3"]


@pytest.mark.slow
def test_threads_and_fresh_contexts_of_a_worker_open_once(
    repo_of_blocks: str, settings: Settings
) -> None:
    told = play(settings, "crowd", repo_of_blocks)
    for each in told.values():
        assert (each["opened"], each["answers"]) == (1, 8)
        assert each["off"] < 1e-6


def test_what_the_parent_has_open_is_of_no_matter_to_its_children(
    repo_of_blocks: str, settings: Settings
) -> None:
    """Its threads are not, either: without care a child would wait for them for ever."""
    told = play(settings, "parent_first", repo_of_blocks)
    assert told["main"]["stats"]["compiled"] == 3
    for each in told["workers"]:
        assert each["off"] < 1e-6
        assert each["stats"]["compiled"] == 3
        assert each["stats"]["process"]["pid"] != told["pid"]
    assert told["then"]["stats"]["compiled"] == 6


def test_the_first_open_is_the_first_worker_s_and_remembered(
    repo_of_blocks: str, settings: Settings
) -> None:
    told = play(settings, "first_opens", repo_of_blocks)
    assert (told["main"], [each["started"] for each in told["workers"]]) == (0, [1, 0, 0])


def test_a_first_open_that_was_ended_from_outside_is_made_again_later(
    repo_of_blocks: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hubaoti.spaces.deferred.REST", 3600.0)
    module = net()
    loaded = hubaoti.spaces.load(module, repo_of_blocks, trust=True, settings=settings)
    with torch.no_grad(), loaded, pytest.warns(Fallback, match="SIGTERM"):
        with struck(signal.SIGTERM):
            module(X)
        module(X)
        assert loaded.stats()["compiled"] == 0
        assert "SIGTERM" in loaded.stats()["process"]["why"]
        later = SimpleNamespace(monotonic=lambda: time.monotonic() + 3601.0)
        monkeypatch.setattr("hubaoti.spaces.deferred.time", later)
        for _ in range(2):  # the first is compared
            module(X)
        assert loaded.stats()["compiled"] > 0


def test_bytes_that_change_after_the_pull_are_never_opened(
    repo_of_blocks: str, settings: Settings
) -> None:
    answer = play(settings, "tampered", repo_of_blocks)
    assert answer["off"] == 0.0
    assert answer["stats"]["compiled"] == 0
    assert answer["stats"]["regions"]["blocks.0"]["eager"] == {"unopened": 1}
    assert "other bytes than its manifest lists" in answer["stats"]["process"]["why"]


@pytest.mark.parametrize("kind", ["artifact", "packages"])
def test_a_worker_hears_what_was_said_of_a_publisher_since_another_opened_the_same(
    kind: str, blocks: Bundle, hub: HfApi, repo: str, settings: Settings
) -> None:
    if kind == "artifact":
        api.push(blocks, repo, as_is=True, settings=settings)
    else:
        package = blocks.path / blocks.manifest.graphs[0].file
        put(hub, repo, "Block/package.pt2", package.read_bytes())
    told = play(settings, "revoked", repo)
    assert max(each["off"] for each in told.values()) < 1e-6
    opened = {name: each["stats"]["compiled"] > 0 for name, each in told.items()}
    assert opened == {"before": True, "rm": False, "add": True, "block": False}
    assert "not trusted here" in told["rm"]["stats"]["process"]["why"]
    assert "is blocked on this machine" in told["block"]["stats"]["process"]["why"]


def test_a_first_open_ends_with_the_worker_that_asked_for_it(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    child = (
        "import os, sys, time; from hubaoti.host.processes import die_with_parent; "
        "die_with_parent(int(sys.argv[1])); open(sys.argv[2], 'w').write(str(os.getpid())); "
        "time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1], "
        "str(os.getpid()), sys.argv[2]], start_new_session=True).wait()"
    )
    started = subprocess.Popen([sys.executable, "-c", parent, child, told])
    wait_until(lambda: told.is_file() and told.read_text())
    pid = int(told.read_text())
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or is_zombie(pid))


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until(is_so: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


# What is planned


def load(module: torch.nn.Module, repo: str, settings: Settings, **how: Any) -> Any:
    return hubaoti.spaces.load(module, repo, settings=settings, **{"trust": True, **how})


def test_another_model_is_refused_at_import_by_name(
    repo_of_blocks: str, settings: Settings
) -> None:
    module = Net(blocks=2, size=12).eval()
    with pytest.raises(MissingConstant, match=r"blocks\.2 is not.*blocks\.0: narrow.* 8 more"):
        load(module, repo_of_blocks, settings)
    assert not any("forward" in vars(part) for part in module.modules())


def test_code_of_a_publisher_who_is_not_trusted_is_not_pulled(
    repo_of_blocks: str, settings: Settings
) -> None:
    with pytest.raises(Untrusted):
        load(net(), repo_of_blocks, settings, trust=False)
    assert not any((settings.mirror / "graphs").iterdir())


def test_a_module_is_loaded_once(repo_of_blocks: str, settings: Settings) -> None:
    module = net()
    with load(module, repo_of_blocks, settings):
        with pytest.raises(AlreadyAttached):
            load(module, repo_of_blocks, settings)
        with pytest.raises(AlreadyAttached):
            hubaoti.attach(module, repo_of_blocks, settings=settings)
    load(module, repo_of_blocks, settings)
    hubaoti.detach(module)
    assert not any("forward" in vars(part) for part in module.modules())


def test_copies_and_pickles_are_of_the_module_as_it_was(
    repo_of_blocks: str, settings: Settings
) -> None:
    module = net()
    with load(module, repo_of_blocks, settings) as loaded, torch.no_grad():
        assert repr(loaded) == "Deferred(Net, waiting, 3 regions)"
        expected = module(X)["y"]
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(X)["y"], expected)
            ours, theirs = (each.blocks[0].forward for each in (module, other))
            assert inspect.signature(ours) == inspect.signature(theirs)
        assert repr(loaded).startswith("Deferred(Net, open: Attachment(Net, artifact ")
        assert loaded.stats()["compiled"] == 0  # the one call was compared
        assert loaded.stats()["compared"] == 3
        module(X)
        assert loaded.stats()["compiled"] == 3


def test_a_fork_while_another_thread_opens_graphs_waits_again(
    repo_of_blocks: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the child does right after the fork, done here at such a moment."""
    from hubaoti.attachment import attach

    module, loaded, forwards = net(), [], []

    def halfway(*args: Any, **kwargs: Any) -> Any:
        loaded[0].renew()
        forwards.extend(vars(block)["forward"].path for block in module.blocks)
        raise RuntimeError("the thread is not there any more")

    loaded.append(load(module, repo_of_blocks, settings))
    monkeypatch.setattr(attach, "attach_graphs", halfway)
    with torch.no_grad(), pytest.warns(Fallback, match="not there any more"):
        module(X)
    assert forwards == ["blocks.0", "blocks.1", "blocks.2"]
    loaded[0].detach()


def test_a_forward_that_somebody_put_over_it_stays(repo_of_blocks: str, settings: Settings) -> None:
    module, seen = net(), []
    with load(module, repo_of_blocks, settings) as loaded, torch.no_grad():
        below = module.blocks[1].forward

        def over(*args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            return below(*args, **kwargs)

        module.blocks[1].forward = over
        for _ in range(3):
            module(X)
        assert len(seen) == 3
        assert loaded.stats()["regions"]["blocks.1"]["compiled"] == {"blocks": 2}


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def reclass(module: Any) -> None:
    module.blocks[0].wide.__class__ = Doubling


def number(module: Any) -> None:
    module.blocks[0].factor = 3.0


def more(module: Any) -> None:
    module.blocks[0].extra = nn.Identity()


@pytest.mark.parametrize("change", [reclass, number, more])
def test_a_module_that_was_changed_since_it_was_loaded_answers_itself(
    change: Callable[[Any], None], repo_of_blocks: str, settings: Settings
) -> None:
    """A worker compares nothing with a module that was another when its parent loaded it."""
    module, plain = net(), net()
    plain.load_state_dict(module.state_dict())
    with load(module, repo_of_blocks, settings) as loaded, torch.no_grad():
        for each in (module, plain):
            change(each)
        with pytest.warns(Fallback, match="blocks.0 was changed since it was loaded"):
            found = module(X)["y"]
        assert torch.equal(found, plain(X)["y"])
        assert not loaded.stats()["process"]["open"]


def test_what_is_asked_strictly_raises(repo_of_blocks: str, settings: Settings) -> None:
    module = net()
    load(module, repo_of_blocks, replace(settings, zerogpu=True), strict=True)
    with torch.no_grad(), pytest.raises(NotServed, match="main"):
        module(X)


def test_with_graphs_switched_off_nothing_is_pulled(settings: Settings, repo: str) -> None:
    module = net()
    loaded = load(module, repo, replace(settings, graphs=False))
    assert "forward" not in vars(module)
    assert loaded.stats()["regions"] == {}


def test_without_a_network_what_was_pulled_before_serves(
    repo_of_blocks: str, settings: Settings
) -> None:
    load(net(), repo_of_blocks, settings).detach()
    offline = replace(settings, offline=True)
    module = net()
    with load(module, repo_of_blocks, offline) as loaded, torch.no_grad():
        assert len(loaded.regions) == 3
        for _ in range(2):  # the first is compared
            module(X)
        assert loaded.stats()["compiled"] == 3
    with pytest.raises(NoArtifact, match="HF_HUB_OFFLINE"):
        load(net(), "acme/never-pulled", offline)
    with pytest.raises(NoArtifact, match="cannot be asked"):
        load(net(), repo_of_blocks, offline, revision="main")
    commit = HfApi(settings.endpoint).repo_info(repo_of_blocks).sha
    with load(net(), repo_of_blocks, offline, revision=commit) as loaded:
        assert len(loaded.regions) == 3


def test_an_artifact_of_another_kind_of_host_is_refused_with_its_reasons(
    blocks: Bundle, repo: str, settings: Settings, tmp_path: Path
) -> None:
    other = copied(blocks, tmp_path / "other")
    needs = replace(other.manifest.requires, glibc="9.99")
    api.push(changed(other, requires=needs), repo, as_is=True, settings=settings)
    with pytest.raises(NoMatch, match=r"glibc 9\.99"):
        load(net(), repo, settings)


def test_what_does_not_fit_on_the_default_branch_hides_no_other_branch(
    blocks: Bundle, repo: str, settings: Settings, tmp_path: Path
) -> None:
    other = copied(blocks, tmp_path / "other")
    needs = replace(other.manifest.requires, glibc="9.99")
    api.push(changed(other, requires=needs), repo, as_is=True, settings=settings)
    api.push(blocks, repo, layout="zerogpu", as_is=True, settings=settings)
    with load(net(), repo, settings) as loaded:
        assert loaded.stats()["artifact"] == blocks.manifest.digest


def copied(bundle: Bundle, folder: Path) -> Bundle:
    import shutil

    shutil.copytree(bundle.path, folder, ignore=shutil.ignore_patterns("*.sha256"))
    return Bundle.read(folder)


# The GPU that is not there


def requirements(**facts: Any) -> Requirements:
    return Requirements(**{**CUDA, "driver": "13.0", **facts})


def test_where_there_is_no_gpu_all_else_is_judged() -> None:
    host = make_gpu_host()
    blind = replace(host, gpus=(), driver=None, driver_cuda=None)
    for sm in (90, 120):
        assert not judge_without_gpu(requirements(sm=sm), blind).refusals
    for wrong in ({"glibc": "9.99"}, {"cuda": "12.8"}, {"torch": "2.11.0+cu130"}):
        assert judge_without_gpu(requirements(**wrong), blind).refusals
    assert judge_without_gpu(requirements(), make_host()).refusals


def test_a_worker_judges_the_gpu_that_its_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is here: what torch would say of one is made up."""
    from hubaoti.runtime import gpus
    from hubaoti.spaces import devices

    monkeypatch.setattr(gpus, "query_gpu", lambda _: Gpu("fake B200", 100, 1 << 37))
    monkeypatch.setattr(devices, "query_driver_cuda", lambda: "13.1")
    blind = replace(make_gpu_host(), gpus=(), driver_cuda=None)
    found = build_worker_host(blind, torch.device("cuda", 0))
    assert [(gpu.name, gpu.sm) for gpu in found.gpus] == [("fake B200", 100)]
    assert found.driver_cuda == "13.1"
    assert build_worker_host(blind, CPU) is blind


# The layout of other loaders


def test_a_branch_in_the_layout_of_other_loaders_is_loaded_with_its_digests(
    blocks: Bundle, repo: str, settings: Settings
) -> None:
    made = api.push(blocks, repo, layout="zerogpu", as_is=True, settings=settings)
    for revision in (made.branch, None):  # the default branch is empty: the others are looked at
        module = net()
        with load(module, repo, settings, revision=revision) as loaded, torch.no_grad():
            assert loaded.stats()["artifact"] == blocks.manifest.digest
            for _ in range(2):
                answer = module(X)["y"]
            assert torch.allclose(answer, net()(X)["y"], atol=1e-6)
            assert loaded.stats()["compiled"] == 3


@pytest.mark.parametrize("kind", ["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def test_its_packages_answer_by_torch_s_own_loader_as_those_loaders_use_it(
    kind: str, request: pytest.FixtureRequest, repo: str, settings: Settings
) -> None:
    made = api.push(
        request.getfixturevalue(kind), repo, layout="zerogpu", as_is=True, settings=settings
    )
    folder = snapshot_download(
        repo, revision=made.branch, allow_patterns="package/*", endpoint=settings.endpoint
    )
    path = {"blocks": "submodules/blocks", "whole": "root"}[kind]
    package = Path(folder) / "package" / path / "package.pt2"
    assert sum(each.is_file() for each in Path(folder).rglob("*")) == 1
    module = net()
    part = module.blocks[1] if kind == "blocks" else module
    loaded = torch._inductor.aoti_load_package(str(package))
    constants = {name: part.state_dict()[name] for name in loaded.get_constant_fqns()}
    loaded.load_constants(constants, check_full_update=True, user_managed=True)
    with torch.no_grad():
        if kind == "whole":
            answer, expected = loaded(X)["y"], module(X)["y"]
        else:
            hidden = torch.randn(3, 4, 16)
            answer = loaded(hidden, mask=torch.ones_like(hidden))
            expected = part(hidden, mask=torch.ones_like(hidden))
    assert torch.allclose(answer, expected, atol=1e-6)


@pytest.fixture
def hub(settings: Settings, repo: str) -> HfApi:
    found = HfApi(settings.endpoint, token=settings.token)
    found.create_repo(repo)
    return found


@pytest.mark.parametrize(
    ("kind", "path", "variant"),
    [
        ("whole", "package/root/package.pt2", None),
        pytest.param(
            *("blocks", "package/submodules/blocks/package.pt2", None), marks=pytest.mark.slow
        ),
        pytest.param("blocks", "Block/package.pt2", None, marks=pytest.mark.slow),
        ("blocks", "Block.fast/package.pt2", "fast"),
    ],
)
def test_packages_without_a_manifest_are_loaded_with_a_warning(
    kind: str,
    path: str,
    variant: str | None,
    request: pytest.FixtureRequest,
    repo: str,
    settings: Settings,
) -> None:
    bundle: Bundle = request.getfixturevalue(kind)
    put(
        request.getfixturevalue("hub"),
        repo,
        path,
        (bundle.path / bundle.manifest.graphs[0].file).read_bytes(),
    )
    told = play(settings, "few", repo, variant=variant)
    assert told["warned"] == ["NoDigests"]
    answers = [*told["workers"], told["main"], told["after"]]
    assert max(answer["off"] for answer in answers) < 1e-6
    served = 1 if kind == "whole" else 3
    counts = [each["stats"]["compiled"] for each in answers]
    assert counts == [served, 2 * served, 2 * served, served, served]
    assert told["clean"]


def put(hub: HfApi, repo: str, path: str, content: bytes) -> None:
    hub.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo)


def test_packages_of_a_publisher_who_is_not_trusted_are_not_fetched(
    whole: Bundle, hub: HfApi, repo: str, settings: Settings
) -> None:
    put(hub, repo, "package/root/package.pt2", (whole.path / "graphs/root.pt2").read_bytes())
    put(hub, repo, "config.json", b'{"kernels": [{"repo_id": "acme/kernel"}]}')
    with pytest.raises(Untrusted, match="no manifest"):
        load(net(), repo, settings, trust=False)
    assert not any((settings.mirror / "graphs").iterdir())


class Other(Net):
    """The same parts, and another sum of them."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": super().forward(x)["y"] + 1.0}


def test_packages_of_another_module_are_never_believed(
    whole: Bundle, hub: HfApi, repo: str, settings: Settings
) -> None:
    """Of the same shapes, and something else: nothing but its answers tells."""
    put(hub, repo, "package/root/package.pt2", (whole.path / "graphs/root.pt2").read_bytes())
    module = Other().eval()
    module.load_state_dict(net().state_dict())
    expected = module(X)["y"].detach()
    with pytest.warns(NoDigests):
        loaded = load(module, repo, settings)
    with torch.no_grad(), pytest.warns(Fallback, match="answered otherwise"):
        for _ in range(2):
            assert torch.equal(module(X)["y"], expected)
    assert loaded.stats()["compiled"] == 0
    loaded.detach()


def test_a_package_that_crashes_takes_no_worker_along(
    hub: HfApi, repo: str, settings: Settings, tmp_path: Path
) -> None:
    source = tmp_path / "crash.c"
    source.write_text(
        "#include <signal.h>\n__attribute__((constructor)) void f(void) { raise(SIGSEGV); }"
    )
    folder = tmp_path / "package/model/data/aotinductor/model"
    folder.mkdir(parents=True)
    library = folder / "a.wrapper.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c", source, "-o", library], check=True)
    pack_folder(tmp_path / "package", tmp_path / "package.pt2")
    put(hub, repo, "package/root/package.pt2", (tmp_path / "package.pt2").read_bytes())
    told = play(settings, "few", repo)
    answers = [*told["workers"], told["main"], told["after"]]
    assert {answer["off"] for answer in answers} == {0.0}
    assert "SIGSEGV" in told["workers"][0]["stats"]["process"]["why"]
    assert all(answer["stats"]["compiled"] == 0 for answer in answers)


def test_a_package_that_cannot_be_opened_costs_one_process_and_no_request_another(
    hub: HfApi, repo: str, settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "package/model/data/aotinductor/model"
    folder.mkdir(parents=True)
    (folder / "a.wrapper.so").write_bytes(b"no library")
    pack_folder(tmp_path / "package", tmp_path / "package.pt2")
    put(hub, repo, "package/root/package.pt2", (tmp_path / "package.pt2").read_bytes())
    told = play(settings, "first_opens", repo)
    assert told["workers"] == [{"off": 0.0, "started": n} for n in (1, 0, 0)]


FAKE_KERNELS = """
import json, os
def get_kernel(**words):
    try:
        file = open(__file__ + ".asked", "a")
    except PermissionError:  # in the process that opens packages first, which may write nothing
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        file = open(os.environ["TMPDIR"] + "/asked", "a")
    with file:
        print(json.dumps([words, os.getpid()]), file=file)
def install_kernel(**words):
    with open(__file__ + ".fetched", "a") as file:
        print(json.dumps(words), file=file)
"""


def test_kernels_of_a_config_are_asked_for_where_packages_are_opened(
    whole: Bundle, hub: HfApi, repo: str, settings: Settings, tmp_path: Path
) -> None:
    kernel = {"repo_id": "acme/kernel", "revision": "v1"}
    put(hub, repo, "package/root/package.pt2", (whole.path / "graphs/root.pt2").read_bytes())
    put(hub, repo, "config.json", json.dumps({"kernels": [kernel]}).encode())
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "kernels.py").write_text(FAKE_KERNELS)
    asked = tmp_path / "fake" / "kernels.py.asked"
    more = {"PYTHONPATH": f"{tmp_path / 'fake'}:{SPACE.parents[1]}"}
    told = play(settings, "few", repo, more=more, main="1")
    found = [json.loads(line) for line in asked.read_text().splitlines()]
    assert all(words == kernel for words, _ in found)
    # The four workers; the process in which the first opens it first asks, too, and is confined.
    pids = {answer["stats"]["process"]["pid"] for answer in [*told["workers"], told["after"]]}
    assert pids == {pid for _, pid in found}
    assert told["after"]["stats"]["compiled"] == 1
    # The main process brings it once, and runs nothing of it.
    assert json.loads((tmp_path / "fake" / "kernels.py.fetched").read_text()) == kernel


def test_a_kernel_of_an_owner_who_is_not_trusted_is_not_run(
    whole: Bundle, hub: HfApi, repo: str, settings: Settings
) -> None:
    """Also where the publisher of the packages is."""
    put(hub, repo, "package/root/package.pt2", (whole.path / "graphs/root.pt2").read_bytes())
    put(hub, repo, "config.json", b'{"kernels": [{"repo_id": "stranger/kernel", "version": 1}]}')
    trusted = Trust(settings.trust)
    trusted.add(settings.endpoint, repo.partition("/")[0])
    with pytest.raises(Untrusted, match="stranger publishes the kernel stranger/kernel"):
        load(net(), repo, settings, trust=False)
    assert not any((settings.mirror / "graphs").iterdir())
    with pytest.raises(Untrusted, match="stranger publishes the kernel stranger/kernel"):
        load(net(), repo, settings, trust=True)  # which names another
    assert not trusted.holds(settings.endpoint, "stranger")
    trusted.add(settings.endpoint, "stranger")
    with pytest.warns(NoDigests):
        load(net(), repo, settings, trust=False).detach()


@pytest.mark.parametrize(
    "config",
    [b"[", b'{"kernels": [{"repo_id": "a/b", "trust_remote_code": true}]}', b'{"kernels": [{}]}'],
)
def test_a_config_that_says_more_than_which_kernel_is_refused(
    config: bytes, whole: Bundle, hub: HfApi, repo: str, settings: Settings
) -> None:
    put(hub, repo, "package/root/package.pt2", (whole.path / "graphs/root.pt2").read_bytes())
    put(hub, repo, "config.json", config)
    with pytest.raises(BadRequest, match=r"config\.json"):
        load(net(), repo, settings)


def test_a_repo_with_nothing_to_run_says_so(hub: HfApi, repo: str, settings: Settings) -> None:
    put(hub, repo, "package/root/other.bin", b"1")
    with pytest.raises(NoArtifact):
        load(net(), repo, settings)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"AOTI_DEVICE_KEY": "cuda"}, "device cuda"),
        ({"AOTI_PLATFORM": "win32"}, "operating system win32"),
        ({"AOTI_MACHINE": "aarch64"}, "machine aarch64"),
        ({"AOTI_CPU_ISA": "AVX512 AVX512_VNNI"}, "AVX-512"),
        ({}, None),
        ({"AOTI_DEVICE_KEY": "cpu", "AOTI_CPU_ISA": "AVX2"}, None),
    ],
)
def test_what_a_package_says_of_its_host_is_judged(said: dict[str, str], why: str | None) -> None:
    found = describe_misfit(said, make_host(), CPU)
    assert (found is None) if why is None else (why in (found or ""))


def test_a_package_of_another_gpu_is_refused() -> None:
    host, cuda = make_gpu_host(), torch.device("cuda", 0)
    assert describe_misfit({"AOTI_COMPUTE_CAPABILITY": "90"}, host, cuda) is None
    assert "sm_120" in (describe_misfit({"AOTI_COMPUTE_CAPABILITY": "120"}, host, cuda) or "")


def test_a_model_whose_config_says_something_else_is_refused(
    roberta_bundle: Bundle, repo: str, settings: Settings
) -> None:
    """A whole model's graph that answers texts is refused, too, and says what to compile."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    api.push(roberta_bundle, repo, as_is=True, settings=settings)
    config = RobertaConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2)
    with pytest.raises((OtherProgram, BadRequest)):
        load(RobertaForSequenceClassification(config).eval(), repo, settings)
