"""FlashAttention-3 all the way without a GPU: kernel pinned, graphs compiled, pulled, launched.

The kernel is PyPI's fa3-fwd, laid out as a repo of kernels. Under the stand-in its host code runs:
it is given what it would be given on a GPU, and refuses what it refuses there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from cuda_models import MODELS
from kernel_repos import lay_out_fa3, push_kernel
from under_stand_in import ask, make_stand_in

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.compiler.interpreted import INTERPRETED_TOLERANCE
from hubaoti.compiler.stand_in import StandIn
from hubaoti.errors import BadRequest, CompileFailed
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

pytestmark = pytest.mark.cuda

KERNEL = "acme/fa3-fwd"
WIDTH = 64

# What the kernel's op is called with, as (strides of the keys, where they lie).
RECORD = """
    import os, torch, hubaoti
    from hubaoti.runtime import kernel_adapters
    from hubaoti.settings import Settings
    given, call = [], kernel_adapters._Adapter._call
    def record(self, rule, q, k, **more):
        more = {name: each for name, each in more.items() if each is not None}
        given.append(dict(q=[*q.shape], k=[*k.shape], strides=[*k.stride()], at=k.data_ptr(),
                          rule=rule, more=sorted(more)))
        return call(self, rule, q=q, k=k, **more)
    kernel_adapters._Adapter._call = record
    settings = Settings.from_env()
    pulled = hubaoti.pull(os.environ["REPO"], trust=True, settings=settings).artifact
"""

# A model that its graphs answer for.
ATTACH = (
    RECORD
    + """
    from cuda_models import MODELS
    kind = MODELS["flux"]
    model = kind.make_on("cuda:0")
    attachment = hubaoti.attach(model, pulled, settings=settings)
    shape = [*kind.call(model, 2, 5).shape]
    say(shape=shape, given=given, stats=attachment.stats(), recipe=str(pulled.manifest.recipe))
"""
)

# Each graph of a decoder's block, opened and called: the values of masks are nobody's there.
CALL = (
    RECORD
    + """
    from hubaoti.mirror import Mirror
    from hubaoti.runtime.first_open import require_sound
    from hubaoti.runtime.golden import make_golden_inputs
    from hubaoti.runtime.graph import open_graph
    from hubaoti.runtime.input_checks import parse_dtype
    device, found = torch.device("cuda", 0), {}
    with Mirror.open(settings.mirror) as mirror:
        require_sound(pulled, mirror, device, lambda step: None)
    for entry in pulled.manifest.graphs:
        graph = open_graph(pulled.graph_folder(entry), entry, device)
        graph.bind({each.fqn: torch.empty_strided(each.shape, each.stride, device=device,
                    dtype=parse_dtype(each.dtype)) for each in entry.constants})
        sizes = {"batch": 2, "seq": 1 if entry.unmasked is True else 5, "filled": 9, "cache": 20}
        inputs = [each.to(device) for each in make_golden_inputs(entry, sizes)]
        given.clear()
        (answer,) = graph(*inputs)
        keys = inputs[entry.cache.keys].data_ptr()
        found[entry.id] = dict(shape=[*answer.shape], given=[*given], keys=keys)
    say(**found)
"""
)

# Steps that are captured. What a mask says is nobody's there, so it is said here.
STEPS = (
    RECORD
    + """
    import transformers
    from hubaoti.attachment import replays
    from hubaoti.attachment.masks import Says
    asked = []
    def read(mask, counts):
        asked.append(len(counts))
        return Says.PADDED if os.environ["SAYS"] == "padded" else Says.ANYTHING
    replays.read_step_mask = read
    config = transformers.LlamaConfig.from_pretrained(os.environ["MODEL"])
    model = transformers.LlamaForCausalLM(config).bfloat16().eval().cuda()
    attachment = hubaoti.attach(model, pulled, settings=settings, cuda_graphs=True)
    cache = transformers.StaticCache(config=config, max_cache_len=20)
    ids = torch.ones(2, 5, dtype=torch.long).cuda()
    with torch.no_grad(): model(ids, past_key_values=cache)
    calls, stats = [], attachment.stats
    def count():
        parts = stats()
        return [parts["regions"]["model.layers.0"]["compiled"], parts["cuda_graphs"]["replayed"]]
    before = count()
    for _ in range(4):
        given.clear()
        mask = torch.ones(2, 1, 1, 20, dtype=torch.bool).cuda()
        given_now = dict(attention_mask=mask, position_ids=torch.full((2, 1), 5).cuda())
        with torch.no_grad(): model(input_ids=ids[:, :1], past_key_values=cache, **given_now)
        calls.append([dict(each) for each in given])
    say(before=before, after=count(), calls=calls, asked=asked, eager=stats()["eager"])
"""
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fa3") / "home"


@pytest.fixture(scope="module")
def stand_in(home: Path) -> StandIn:
    return make_stand_in(home)


@pytest.fixture(scope="module")
def settings(home: Path, endpoint: Endpoint) -> Settings:
    """Where all is compiled."""
    return Settings(home=home, endpoint=endpoint.url, token=endpoint.token)


@pytest.fixture(scope="module")
def kernel(endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> str:
    """PyPI's build, published as a kernel."""
    push_kernel(endpoint, KERNEL, lay_out_fa3(tmp_path_factory.mktemp("kernel")))
    return KERNEL


def save_llama(folder: Path) -> Path:
    """A decoder in bfloat16, of which four heads share two of keys; no weights are written."""
    config = transformers.LlamaConfig(
        hidden_size=4 * WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(kernel: str, settings: Settings, home: Path) -> Bundle:
    (bundle,) = hubaoti.compile_for(
        save_llama(home.parent / "llama"),
        "sm90",
        home.parent / "bundles",
        task="generate",
        dims={"batch": (1, 3), "seq": (1, 24), "cache": (16, 32)},
        attention="fa3",
        kernel=kernel,
        settings=settings,
    )
    return bundle


@pytest.fixture(scope="module")
def flux(kernel: str, settings: Settings, home: Path) -> Mapping[str, Bundle]:
    """The blocks of a DiT, with the kernel and without it, by one command."""
    kind = MODELS["flux"]
    model = kind.make()
    words = dict(kind.options) | {"attention": "fa3,sdpa", "kernel": kernel}
    with warnings.catch_warnings(action="ignore"):  # of its own, as of a norm in bfloat16
        with hubaoti.capture(model) as calls:
            for rows, places in ((1, 4), (2, 6), (3, 9)):
                kind.call(model, rows, places)
        output = home.parent / "flux"
        made = hubaoti.compile_for(model, "sm90", output, calls=calls, settings=settings, **words)
    return dict(zip(("fa3", "sdpa"), made, strict=True))


def publish(settings: Settings, name: str, *bundles: Bundle) -> str:
    return f"{hubaoti.push(bundles, name, tag='v1', settings=settings).repo}@v1"


def env_of(endpoint: Endpoint, repo: str, home: Path) -> dict[str, str]:
    env = {"REPO": repo, "HUBAOTI_HOME": str(home), "HF_TOKEN": endpoint.token}
    return env | {"HF_ENDPOINT": endpoint.url}


def test_a_bundle_says_its_recipe_its_kernel_and_what_that_does_not_compute(llama: Bundle) -> None:
    manifest = llama.manifest
    assert str(manifest.recipe) == "bfloat16-fa3" and llama.path.name.endswith("-fa3")
    (pin,) = manifest.requires.kernels
    assert (pin.repo, pin.namespace, pin.archs) == (KERNEL, "fa3_fwd", ("9.0a",))
    assert [(each.id, each.masks or None) for each in manifest.graphs] == [
        ("model.layers-decode", None),
        ("model.layers-padded", "padded"),
        ("model.layers", None),
    ]
    assert [bool(each.not_fa3) for each in manifest.graphs] == [False, False, True]
    assert manifest.graphs[2].not_fa3 == (f"2 heads of {WIDTH} under a mask: memory-efficient",)
    assert [each.ops or () for each in manifest.graphs] == [
        ("hubaoti::fa3_fwd",),
        ("hubaoti::fa3_decode",),
        (),
    ]
    assert [[*(each.schemas or ())] for each in manifest.graphs] == [
        [*(each.ops or ())] for each in manifest.graphs
    ]
    members = [member.path for each in manifest.graphs for member in each.members]
    assert not any(path.endswith(".wrapper.json") for path in members), "torch's executor is asked"


@pytest.mark.parametrize("name", ["llama", pytest.param("flux", marks=pytest.mark.slow)])
def test_what_surrounds_the_kernel_was_interpreted(
    name: str, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(name)
    for manifest in [each.manifest for each in ([made] if name == "llama" else made.values())]:
        checks = [check for check in manifest.checks if check.where == "interpreted"]
        assert all([c.graph for c in checks].count(each.id) >= 3 for each in manifest.graphs)
        assert not any(each.not_interpreted for each in manifest.graphs)
        worst = max(check.max_relative for check in checks)
        assert worst <= INTERPRETED_TOLERANCE["bfloat16"]


def test_a_decoders_graphs_call_the_kernel_over_the_caches_own_memory(
    llama: Bundle, settings: Settings, stand_in: StandIn, endpoint: Endpoint, tmp_path: Path
) -> None:
    repo = publish(settings, "acme/llama-fa3", llama)
    found = ask(stand_in, CALL, 90, env=env_of(endpoint, repo, tmp_path / "home"))
    rule = [WIDTH**-0.5, True, -1, -1, 0.0]
    over = [20 * 2 * WIDTH, WIDTH, 20 * WIDTH, 1]  # of (batch, heads, places, width)
    (step,) = found["model.layers-decode"]["given"]
    assert (step["q"], step["k"]) == ([2, 1, 4, WIDTH], [2, 9, 2, WIDTH])
    assert (step["strides"], step["rule"], step["more"]) == (
        over,
        [rule[0], False, *rule[2:]],
        ["v"],
    )
    (told,) = found["model.layers-padded"]["given"]
    assert (told["q"], told["k"]) == ([2, 5, 4, WIDTH], [2, 20, 2, WIDTH])
    assert (told["strides"], told["rule"]) == (over, rule)
    assert told["more"] == ["leftpad_k", "seqused_k", "v"]  # a prompt's rows are there already
    for name, call in (("decode", step), ("padded", told)):
        assert call["at"] == found[f"model.layers-{name}"]["keys"], "the cache was copied"
    assert not found["model.layers"]["given"]


@pytest.mark.parametrize(("says", "graph"), [("padded", "-padded"), ("anything", "")])
def test_a_captured_step_calls_the_kernel_where_its_mask_says_lengths(  # noqa: PLR0913 - fixtures
    says: str,
    graph: str,
    llama: Bundle,
    settings: Settings,
    stand_in: StandIn,
    endpoint: Endpoint,
    home: Path,
    tmp_path: Path,
) -> None:
    repo = publish(settings, "acme/llama-fa3", llama)
    env = env_of(endpoint, repo, tmp_path / "home")
    env |= {"SAYS": says, "MODEL": str(home.parent / "llama")}
    found = ask(stand_in, STEPS, 90, env=env)
    (before, _), (after, replayed) = found["before"], found["after"]
    counted = {name: n - before[name] for name, n in after.items() if n != before[name]}
    assert counted == {f"model.layers{graph}": 2}, "rehearsed, and captured"
    assert (replayed, found["eager"], found["asked"]) == (3, 0, [2] * 4)
    called = [len(each) for each in found["calls"]]
    assert called == ([2, 2, 0, 0] if graph else [0, 0, 0, 0]), "a call for each block"
    for each in found["calls"][1][: bool(graph)]:
        assert (each["q"], each["k"]) == ([2, 1, 4, WIDTH], [2, 20, 2, WIDTH])
        assert "leftpad_k" in each["more"]


@pytest.mark.slow
def test_both_recipes_of_one_program_are_built_by_one_command(flux: Mapping[str, Bundle]) -> None:
    fa3, sdpa = flux["fa3"].manifest, flux["sdpa"].manifest
    assert fa3.program == sdpa.program and fa3.key != sdpa.key
    assert fa3.requires.kernels and not sdpa.requires.kernels
    assert not any(graph.not_fa3 for graph in fa3.graphs)
    compared = [[c for c in each.checks if c.where == "cpu"] for each in (fa3, sdpa)]
    assert compared[0] and compared[0] == compared[1], "one program, compared once"


@pytest.mark.slow
def test_of_both_recipes_the_kernels_is_pulled_attached_and_launched(
    flux: Mapping[str, Bundle],
    settings: Settings,
    stand_in: StandIn,
    endpoint: Endpoint,
    tmp_path: Path,
) -> None:
    repo = publish(settings, "acme/flux-fa3", *flux.values())
    found = ask(stand_in, ATTACH, 90, env=env_of(endpoint, repo, tmp_path / "home"))
    assert found["recipe"] == "bfloat16-fa3"
    for path in MODELS["flux"].served:
        region = found["stats"]["regions"][path]
        assert sum(region["compiled"].values()) == 1 and not region["eager"], region
    assert [call["q"] for call in found["given"]] == [[2, 22, 2, 16]] * 2


@pytest.mark.slow
def test_where_only_one_recipe_can_be_the_other_is_refused_and_kept_out(
    kernel: str, settings: Settings, tmp_path: Path
) -> None:
    """A model whose attention has masks alone; and one in float32."""
    small = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).eval().bfloat16()
    with torch.no_grad(), hubaoti.capture(small) as calls:
        for rows in (3, 5):
            small(torch.randn(rows, 8).bfloat16())
    words = {"calls": calls, "attention": "fa3,sdpa", "kernel": kernel, "settings": settings}
    with pytest.raises(CompileFailed, match="no graph calls FlashAttention-3") as caught:
        hubaoti.compile_for(small, "sm90", tmp_path / "small", **words)
    (kept,) = (tmp_path / "small").iterdir()
    assert Bundle.read(kept).manifest.build.attention != "fa3" and str(kept) in caught.value.hint
    assert kept.name == str(Bundle.read(kept).manifest.variant)
    folder = save_llama(tmp_path / "llama")
    with pytest.raises(BadRequest, match="asked in float32"):
        hubaoti.compile_for(
            folder, "sm90", tmp_path / "none", dtype="float32", attention="fa3", settings=settings
        )
