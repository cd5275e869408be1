"""`hubaoti.attachment.replays`: decoding steps that are captured once, and replayed.

Under the stand-in host code runs and nothing is computed: seen is what is launched, captured and
replayed, and what is refused as a driver refuses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cuda_models import MODELS
from under_stand_in import ask, make_stand_in

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.compiler.stand_in import StandIn
from hubaoti.settings import Settings

pytestmark = pytest.mark.cuda

# A model with its graphs, and steps over a cache; `BUNDLE` is given.
STEPS = """
    import os, gc, warnings, torch, transformers, hubaoti
    from pathlib import Path
    from cuda_models import MODELS
    from hubaoti.settings import Settings
    model = MODELS["qwen2"].make_on("cuda:0")
    bundle, settings = Path(os.environ["BUNDLE"]), Settings.from_env()
    attachment = hubaoti.attach(model, bundle, cuda_graphs=True, trust=True, settings=settings)

    def make_cache(places=32):
        return transformers.StaticCache(config=model.config, max_cache_len=places)

    def fill(cache, rows=1):
        ids = torch.ones(rows, 5, dtype=torch.long).cuda()
        place = torch.arange(5)[None].cuda()
        with torch.no_grad(): model(ids, past_key_values=cache, position_ids=place)

    def step(cache, rows=1, **words):
        mask = torch.ones(rows, 1, 1, cache.layers[0].keys.shape[2], dtype=torch.bool).cuda()
        ids, place = torch.ones(rows, 1, dtype=torch.long).cuda(), torch.full((rows, 1), 5).cuda()
        given = dict(attention_mask={"full_attention": mask}, position_ids=place)
        with torch.no_grad(): return model(input_ids=ids, past_key_values=cache, **given, **words)

    def count(): return {k: v for k, v in attachment.stats()["cuda_graphs"].items() if k != "bytes"}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replays") / "home"


@pytest.fixture(scope="module")
def stand_in(home: Path) -> StandIn:
    return make_stand_in(home)


@pytest.fixture(scope="module")
def bundle(home: Path) -> Bundle:
    """A decoder by its blocks, for one capability."""
    settings = Settings(home=home, endpoint="http://127.0.0.1:9")
    source = home.parent / "model"
    kind = MODELS["qwen2"]
    kind.make().config.save_pretrained(source)
    made = hubaoti.compile_for(
        source, (90,), home.parent / "bundles", settings=settings, **kind.options
    )
    return made[0]


def run(code: str, stand_in: StandIn, bundle: Bundle, home: Path, **env: str) -> dict[str, Any]:
    around = {"BUNDLE": str(bundle.path), "HUBAOTI_HOME": str(home), **env}
    around |= {"HF_ENDPOINT": "http://127.0.0.1:9"}
    return ask(stand_in, STEPS + code, 90, env=around)


def test_the_second_step_is_captured_and_all_others_are_replayed(
    stand_in: StandIn, bundle: Bundle, home: Path, tmp_path: Path
) -> None:
    code = """
    cache, found = make_cache(), []
    fill(cache)
    shapes = []
    for _ in range(5):
        out = step(cache)
        shapes.append([*out.logits.shape, out.past_key_values is cache])
        found.append(count())
    stats = attachment.stats()
    say(found=found, shapes=shapes, regions=stats["regions"], bytes=stats["cuda_graphs"]["bytes"])
    """
    log = tmp_path / "log"
    found = run(code, stand_in, bundle, home, STAND_IN_LOG=str(log))
    steps = [(each["captured"], each["replayed"]) for each in found["found"]]
    assert steps == [(0, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert found["shapes"] == [[1, 1, 128, True]] * 5
    assert found["bytes"] > 0
    for region in found["regions"].values():
        assert not region["eager"] and sum(region["compiled"].values()) == 3, region
    lines = log.read_text().splitlines()
    ends = [place for place, line in enumerate(lines) if line.startswith("capture of")]
    captured = lines[lines.index("capture begins") : ends[0]]
    assert sum(line.startswith("launch triton_") for line in captured) > 2
    assert not [line for line in captured if line.startswith("event")]
    assert sum(line.startswith("replay of") for line in lines) == 4


def test_another_cache_and_more_rows_are_steps_of_their_own_and_few_are_kept(
    stand_in: StandIn, bundle: Bundle, home: Path
) -> None:
    code = """
    from hubaoti.attachment.replays import MOST
    caches = [make_cache() for _ in range(MOST + 2)]
    for cache in caches:
        fill(cache)
        for _ in range(2): step(cache)
    many = count()
    del caches, cache; gc.collect()
    gone = count()
    longer, wider = make_cache(24), make_cache()
    fill(longer); fill(wider, 2)
    for _ in range(3): step(longer), step(wider, 2)
    say(many=many, gone=gone, other=count(), most=MOST)
    """
    found = run(code, stand_in, bundle, home)
    most = found["most"]
    assert found["many"] == {"captured": most, "replayed": most + 2}
    assert found["gone"]["captured"] == 0
    assert found["other"] == {"captured": 2, "replayed": most + 2 + 4}


def test_what_is_no_step_or_is_another_model_by_now_is_not_replayed(
    stand_in: StandIn, bundle: Bundle, home: Path
) -> None:
    code = """
    cache = make_cache()
    fill(cache)
    for _ in range(3): step(cache)
    before = count()
    fill(make_cache())                                     # a prompt
    with torch.no_grad(): model(torch.ones(1, 1, dtype=torch.long).cuda())  # no cache
    same = count()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    step(cache)
    replaced = count()
    step(cache); step(cache)
    hooked = []
    model.model.norm.register_forward_hook(lambda *_: hooked.append(1))
    step(cache)
    after_hook = count()
    attachment.detach()
    say(before=before, same=same, replaced=replaced, hooked=hooked, after_hook=after_hook,
        bare="forward" in vars(model), left=count()["captured"])
    """
    found = run(code, stand_in, bundle, home)
    assert found["before"] == found["same"] == {"captured": 1, "replayed": 2}
    assert found["replaced"] == {"captured": 0, "replayed": 2}
    assert found["hooked"] == [1] and found["after_hook"] == {"captured": 0, "replayed": 4}
    assert not found["bare"] and found["left"] == 0


def test_what_a_step_read_of_the_model_s_attributes_is_seen_when_it_is_another(
    stand_in: StandIn, bundle: Bundle, home: Path
) -> None:
    code = """
    cache, block, seen, found = make_cache(), model.model.layers[0], [], {}
    fill(cache)
    for _ in range(3): step(cache)
    found["before"] = count()
    inner = block.forward
    def wrapper(*args, **words):                           # over what is put over it already
        seen.append(1)
        return inner(*args, **words)
    block.forward = wrapper
    step(cache)
    found["wrapped"] = [*count().values(), len(seen)]
    block.forward = inner
    for _ in range(3): step(cache)
    found["again"] = count()["captured"]
    model.model.rope_deltas = torch.zeros(1).cuda()        # as models of images keep theirs
    step(cache)
    found["kept"] = count()["captured"]
    for _ in range(2): step(cache)
    found["third"] = count()["captured"]
    model.model.rotary_emb.attention_scaling = 2.0
    step(cache)
    found["scaled"] = count()["captured"]
    for _ in range(2): step(cache)
    model.config._attn_implementation = "eager"
    step(cache)
    found["other attention"] = [*count().values()]
    model.config._attn_implementation = "sdpa"
    step(cache)
    found["sdpa again"] = [*count().values()]
    say(**found)
    """
    found = run(code, stand_in, bundle, home)
    assert found["before"] == {"captured": 1, "replayed": 2}
    assert found["wrapped"] == [0, 2, 1]
    assert found["again"] == 1 and found["kept"] == 0
    assert found["third"] == 1 and found["scaled"] == 0
    captured, replayed = found["other attention"]
    assert captured == 1 and found["sdpa again"] == [1, replayed + 1]


def test_steps_that_are_never_alike_are_told_of_and_run_as_without(
    stand_in: StandIn, bundle: Bundle, home: Path
) -> None:
    code = """
    from hubaoti.attachment.replays import MOST
    cache = make_cache()
    fill(cache)
    def grow(places):                                      # a mask of what is filled, as loops have
        mask, ids = torch.ones(1, places, dtype=torch.long).cuda(), torch.ones(1, 1).long().cuda()
        place = torch.full((1, 1), places - 1).cuda()
        words = dict(attention_mask=mask, position_ids=place, past_key_values=cache)
        with torch.no_grad(): return [*model(input_ids=ids, **words).logits.shape]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        shapes = [grow(6 + at) for at in range(MOST + 3)]
    grown = count()
    for _ in range(3): step(cache)                         # still none of those before
    other = make_cache()
    fill(other)
    for _ in range(3): step(other)
    say(shapes=shapes, grown=grown, after=count(), warned=[str(each.message) for each in warned])
    """
    found = run(code, stand_in, bundle, home)
    assert all(shape == [1, 1, 128] for shape in found["shapes"])
    assert found["grown"] == {"captured": 0, "replayed": 0}
    (said,) = [each for each in found["warned"] if "(capture)" in each]
    assert "none like one before" in said
    assert found["after"] == {"captured": 1, "replayed": 2}


def test_a_step_that_is_captured_while_weights_change_is_not_kept(
    stand_in: StandIn, bundle: Bundle, home: Path
) -> None:
    code = """
    from hubaoti.attachment import replays
    cache, other = make_cache(), make_cache(24)
    fill(cache); fill(other)
    step(cache)
    patch, own = replays.StepReplays, replays.StepReplays._find_obstacle
    def change(self):                                      # as another thread does meanwhile
        weight = model.lm_head.weight
        model.lm_head.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        step(other)
        return own(self)
    patch._find_obstacle = change
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        shape = [*step(cache).logits.shape]
    patch._find_obstacle = own
    meanwhile = count()
    for _ in range(3): step(cache)
    say(shape=shape, meanwhile=meanwhile, after=count(), warned=[str(w.message) for w in warned])
    """
    found = run(code, stand_in, bundle, home)
    assert found["shape"] == [1, 1, 128]
    assert found["meanwhile"] == {"captured": 0, "replayed": 0}
    assert "the model was changed while a step was captured" in found["warned"][0]
    assert found["after"] == {"captured": 1, "replayed": 2}


def test_memory_that_runs_out_in_a_capture_is_told_and_the_step_answered(
    stand_in: StandIn, bundle: Bundle, home: Path
) -> None:
    code = """
    cache = make_cache()
    fill(cache)
    step(cache)
    free = torch.cuda.mem_get_info()[0]
    taken = ctypes.c_void_p()
    assert not _driver.cudaMalloc(ctypes.byref(taken), ctypes.c_size_t(free))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        shapes = [[*step(cache).logits.shape] for _ in range(3)]
    _driver.cudaFree(taken)
    say(shapes=shapes, warned=[str(each.message) for each in warned], count=count(),
        eager=attachment.stats()["eager"])
    """
    found = run(code, stand_in, bundle, home)
    assert found["shapes"] == [[1, 1, 128]] * 3 and found["count"]["captured"] == 0
    (said,) = [each for each in found["warned"] if "(capture)" in each]
    assert "out of memory" in said
    assert found["eager"] == 1


def test_a_step_that_a_driver_refuses_to_capture_leaves_nothing_behind(
    stand_in: StandIn, bundle: Bundle, home: Path
) -> None:
    code = """
    cache, rotary = make_cache(), model.model.rotary_emb
    own, main = rotary.forward, torch.cuda.current_stream()
    fill(cache)
    rotary.forward = lambda x, places: (places.max().item(), own(x, places))[1]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        shapes = [[*step(cache).logits.shape] for _ in range(3)]
    refused = count()
    stays = torch.cuda.current_stream() == main
    torch.multinomial(torch.ones(4, device="cuda"), 1)
    del rotary.forward
    for _ in range(3): step(cache)
    say(shapes=shapes, refused=refused, stays=stays, after=count(),
        warned=[str(each.message) for each in warned if "(capture)" in str(each.message)])
    """
    found = run(code, stand_in, bundle, home)
    assert found["shapes"] == [[1, 1, 128]] * 3 and found["stays"]
    assert found["refused"] == {"captured": 0, "replayed": 0}
    assert len(found["warned"]) == 1, found["warned"]
    assert found["after"] == {"captured": 1, "replayed": 2}


def test_weights_that_are_bound_anew_are_captured_anew(
    stand_in: StandIn, bundle: Bundle, home: Path
) -> None:
    code = """
    cache, found = make_cache(), []
    fill(cache)
    def take(times):
        for _ in range(times): step(cache)
        found.append(count()["captured"])
    take(2)
    attachment.rebind()
    take(1); take(1)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
    take(1); take(1)
    say(found=found, eager=attachment.stats()["eager"])
    """
    found = run(code, stand_in, bundle, home)
    assert found == {"found": [1, 0, 1, 0, 1], "eager": 0}


def test_tensors_of_a_cache_that_change_at_each_step_are_not_captured(
    stand_in: StandIn, bundle: Bundle, home: Path
) -> None:
    code = """
    cache = make_cache()
    fill(cache, 2)
    kept = []
    for _ in range(4):
        step(cache, 2)
        kept += [(layer.keys, layer.values) for layer in cache.layers]
        cache.reorder_cache(torch.zeros(2, dtype=torch.long).cuda())
    say(**count())
    """
    assert run(code, stand_in, bundle, home) == {"captured": 0, "replayed": 0}


def test_another_thread_may_call_and_allocate_while_a_step_is_captured(
    stand_in: StandIn, bundle: Bundle, home: Path
) -> None:
    code = """
    import threading
    done, other = threading.Event(), []
    def work():
        cache = make_cache()
        with torch.cuda.stream(torch.cuda.Stream()):
            fill(cache)
            while not done.is_set():
                torch.empty(1 << 22, device="cuda"); torch.cuda.empty_cache()
                ids = torch.ones(1, 2, dtype=torch.long).cuda()
                with torch.no_grad(): model(ids, use_cache=False)
                other.append(1)
    thread = threading.Thread(target=work); thread.start()
    for _ in range(6):
        cache = make_cache(); fill(cache)
        for _ in range(3): step(cache)
    done.set(); thread.join()
    regions = attachment.stats()["regions"].values()
    say(count=count(), others=len(other), eager=[region["eager"] for region in regions])
    """
    found = run(code, stand_in, bundle, home)
    # A cache that lies where one lay before is captured at its first step.
    assert 12 <= found["count"]["replayed"] <= 18 and found["others"] > 0
    assert not any("capture" in each for each in found["eager"])


def test_a_library_that_calls_ops_through_torch_s_executor_can_be_captured(
    stand_in: StandIn, tmp_path: Path
) -> None:
    """Its blocks share the library, and no call of it asks an event, as none of any other does."""
    code = """
    import os, torch, zipfile
    from pathlib import Path
    from hubaoti.runtime.library import Library
    from hubaoti.runtime.runners import OnDevice, open_native_runner

    @torch.library.custom_op("outside::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Model(torch.nn.Linear):
        def forward(self, x): return torch.relu(torch.ops.outside.twice(super().forward(x))) + 1

    model, x = Model(16, 16).cuda().requires_grad_(False), torch.ones(4, 16).cuda()
    folder, device = Path(os.environ["SCRATCH"]), torch.device("cuda", 0)
    program = torch.export.export(model, (x,))
    options = {"aot_inductor.package_constants_in_so": False}
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "model.pt2"), inductor_configs=options
    )
    zipfile.ZipFile(package).extractall(folder)
    (library,) = folder.rglob("*.wrapper.so")
    runners = [open_native_runner(folder, Library.at(library), device) for _ in range(3)]
    for runner in runners:
        state, names = model.state_dict(), runner.get_constant_names_to_original_fqns()
        runner.update_constant_buffer({k: state[v] for k, v in names.items()}, False, True, True)
        runner.run([x])  # its kernels are loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (answer,) = runners[0].run([x])
    graph.replay()
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = {line.split()[-1] for line in maps if line.endswith(".wrapper.so")}
    kinds, notes = {type(runner).__name__ for runner in runners}, library.with_suffix(".json")
    say(shape=[*answer.shape], kinds=[*kinds], mapped=len(mapped), notes=notes.exists())
    """
    log = tmp_path / "log"
    around = {"SCRATCH": str(tmp_path), "STAND_IN_LOG": str(log)}
    found = ask(stand_in, code, 90, env=around)
    assert found == {"shape": [4, 16], "kinds": ["OnDevice"], "mapped": 1, "notes": True}
    lines = log.read_text().splitlines()
    begun = lines.index("capture begins")
    ended = next(place for place, line in enumerate(lines) if line.startswith("capture of"))
    captured = lines[begun:ended]
    assert any(line.startswith("launch triton_") for line in captured)
    assert not [line for line in captured if line.startswith("event")]
