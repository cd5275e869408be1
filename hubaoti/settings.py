"""What the environment says, read in one place, once, when the CLI or the face asks."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hubaoti.disk import read_small
from hubaoti.errors import BadRequest

ENDPOINT = "https://huggingface.co"
# Of inductor's variables, all but those that say how it works and not what it builds.
_TUNING = re.compile(
    r"TORCHINDUCTOR_(?!\w*(CACHE|THREADS|WORKER|TIMEOUT|LOG|DIR|PROGRESS|COMPILE_TIME))"
    r"|AOT_INDUCTOR_|ENABLE_(PERSISTENT_TMA|TEMPLATE)_|CUTLASS_EPILOGUE_FUSION\Z"
)
# Of triton's, and of its compilers', those that change what it builds (checked on 3.6 to 3.9).
_KERNELS = re.compile(
    r"TRITON_(INTERPRET|DEBUG|DEFAULT_FP_FUSION|FORCE_DISABLE_FP_FUSION|F32_DEFAULT|ENABLE_ASAN"
    r"|INSTRUMENTATION_MODE|KERNEL_OVERRIDE|OVERRIDE_ARCH|LIBDEVICE_PATH|MOCK_PTX_VERSION"
    r"|STORE_BINARY_ONLY|PTXAS_(BLACKWELL_)?PATH|SWAP_MIR\w*)"
    r"|PTXAS_OPTIONS|DISABLE_PTXAS_OPT|DISABLE_LLVM_OPT|LLVM_EXTRACT_DI_LOCAL_VARIABLES|USE_IR_LOC"
)
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUBAOTI_SERVE_TOKEN", "HUBAOTI_UPSTREAM_TOKEN")
# The Hub's tokens and our endpoint's, what a header says, and what stands before the @ of a URL.
_SECRET = re.compile(
    r"(?<![A-Za-z0-9])hf_(?!hub_|raise_)[\w.-]{8,}"
    r"|(?i:(?<=bearer )|(?<=basic ))[^\s'\",]{8,}"
    r"|(?<=://)[^/\s]+(?=@)"
)
# What Python, torch, CUDA and their loader read: all that a process that runs a graph is told of.
_NEEDED = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|VIRTUAL_ENV|CONDA_PREFIX|CC|CXX"
    r"|(PYTHON|LD_|LIBRARY_|GLIBC_|MALLOC_|OMP_|GOMP_|KMP_|MKL_|OPENBLAS_|DNNL_|ONEDNN_|ATEN_"
    r"|TORCH|PYTORCH_|AOT|TRITON_|STAND_IN_|CUDA|CUBLAS|CUDNN|NVIDIA_|XDG_CACHE_HOME"
    r"|HUBAOTI_HOME|HF_HOME|HF_HUB_CACHE|HF_MODULES_CACHE|HUGGINGFACE_HUB_CACHE|KERNELS_CACHE"
    r"|HF_HUB_OFFLINE|HF_HUB_DISABLE_|TRANSFORMERS_|TOKENIZERS_)\w*"
)
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZERS_)|SECRET|PASSW|CREDENTIAL|KEY(?!RING)|AUTH", re.IGNORECASE
)
_URL = re.compile(
    r"(?P<scheme>(?i:https?))://(?P<host>[^/?#]*?)(?::(?P<port>[0-9]*))?(?P<path>(?:[/?#].*)?)"
)
_LARGEST_TOKEN = 64 << 10  # bytes of a file
_LARGEST_PORT = 65535
_PORTS = {"http": "80", "https": "443"}
_TRUE = {"1", "ON", "YES", "TRUE"}
_FALSE = {"0", "OFF", "NO", "FALSE"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Where things are: our folder, the Hub, and the token for it.

    `token` is None when the environment has none; the client then uses the stored login, where the
    endpoint is huggingface.co. `login` is the `user:password` of an endpoint behind one:
    it is taken out of `endpoint`, which is printed and kept.
    `kernel_cache` is where the kernels library keeps what it fetched; None is nowhere. `tuning` are
    variables that change what inductor builds, which no key would know of. Without `graphs`,
    `AOTI_DISABLED=1` or `ENABLE_AOTI_COMPILATION=0`, everything is answered by eager. `zerogpu` is
    `SPACES_ZERO_GPU`: this is a Space whose workers have a GPU, and this process has none.
    `visible_gpus` and `gpu_order` are `CUDA_VISIBLE_DEVICES`, None where it hides nothing, and
    `CUDA_DEVICE_ORDER`. `lock` is `HUBAOTI_LOCK`, the lockfile by which everything is pulled.
    """

    home: Path
    endpoint: str = ENDPOINT
    token: str | None = None
    offline: bool = False
    kernel_cache: Path | None = None
    tuning: tuple[str, ...] = ()
    graphs: bool = True
    zerogpu: bool = False
    login: str | None = None
    visible_gpus: str | None = None
    gpu_order: str = ""
    lock: Path | None = None

    def __post_init__(self) -> None:
        require_url(self.endpoint, "HF_ENDPOINT")
        endpoint, login = split_login(self.endpoint)
        object.__setattr__(self, "endpoint", endpoint)
        if login is not None:
            object.__setattr__(self, "login", login)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read `HUBAOTI_HOME`, `HUBAOTI_LOCK`, `HF_ENDPOINT`, `HF_TOKEN`, and the others'."""
        env = os.environ if env is None else env
        cache = Path(env.get("XDG_CACHE_HOME") or "~/.cache")
        home = Path(env.get("HUBAOTI_HOME") or cache / "hubaoti")
        return cls(
            home=_find_home(home, "HUBAOTI_HOME").absolute(),
            # As of the token, a file's last newline comes along easily.
            endpoint=env.get("HF_ENDPOINT", "").strip() or ENDPOINT,
            # As huggingface_hub reads it: a file's last newline comes along easily.
            token="".join(env.get("HF_TOKEN", "").split()) or None,
            offline=env.get("HF_HUB_OFFLINE", "").upper() in _TRUE,
            kernel_cache=_find_kernel_cache(env, cache),
            tuning=tuple(sorted(name for name in env if _TUNING.match(name))),
            graphs=env.get("AOTI_DISABLED", "").upper() not in _TRUE
            and env.get("ENABLE_AOTI_COMPILATION", "").upper() not in _FALSE,
            zerogpu=env.get("SPACES_ZERO_GPU", "").upper() in {*_TRUE, "T"},
            visible_gpus=env.get("CUDA_VISIBLE_DEVICES"),
            gpu_order=env.get("CUDA_DEVICE_ORDER", ""),
            lock=Path(env["HUBAOTI_LOCK"]).absolute() if env.get("HUBAOTI_LOCK") else None,
        )

    def to_env(self) -> dict[str, str]:
        """The variables that say this to another process; `from_env` reads them back.

        But for `kernel_cache`: no variable says that it is nowhere.
        """
        scheme, mark, rest = self.endpoint.rpartition("://")
        login = f"{self.login}@" if self.login is not None else ""
        said = {
            "HUBAOTI_HOME": str(self.home),
            "HF_ENDPOINT": f"{scheme}{mark}{login}{rest}",
            "HF_TOKEN": self.token or "",
            "HF_HUB_OFFLINE": "1" if self.offline else "",
            "KERNELS_CACHE": str(self.kernel_cache or ""),
            "AOTI_DISABLED": "" if self.graphs else "1",
            "CUDA_DEVICE_ORDER": self.gpu_order,
            "HUBAOTI_LOCK": str(self.lock or ""),
        }
        if self.visible_gpus is not None:
            said["CUDA_VISIBLE_DEVICES"] = self.visible_gpus
        return said | dict.fromkeys(self.tuning, "1")

    def __repr__(self) -> str:
        """As a dataclass prints, without the token."""
        token = "set" if self.token else "unset"
        return f"Settings({self.home}, {self.endpoint}, token {token}, offline={self.offline})"

    @property
    def basic(self) -> str | None:
        """The header that says `login`, whose words are written as a URL writes them."""
        if self.login is None:
            return None
        user, _, password = self.login.partition(":")
        plain = f"{unquote(user)}:{unquote(password)}"
        return f"Basic {base64.b64encode(plain.encode()).decode()}"

    @property
    def mirror(self) -> Path:
        """The folder of the local store, below our own."""
        return self.home / "mirror"

    @property
    def trust(self) -> Path:
        """The publishers whose code this machine may run."""
        return self.home / "trust.toml"


def _find_home(path: Path, name: str) -> Path:
    """A path without the `~` that stands for a user's home.

    Raises:
        BadRequest: nobody knows that home; `name` is the variable that says another path.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        message = f"{path} is in the home of a user that this machine does not know"
        hint = f"set HOME, or {name} to a path that begins with a slash"
        raise BadRequest(message, hint=hint) from error


def require_url(url: str, name: str) -> None:
    """See that a URL can be asked: its port is one, and it has nothing that no URL has.

    Raises:
        BadRequest: it cannot. Neither message nor hint has what may be a password.
    """
    hint = "write it as https://huggingface.co or http://127.0.0.1:8000"
    if not url.isprintable() or url.split() != [url]:
        problem = "it has a space, or a byte that no URL has"
        raise BadRequest(f"{name} is no URL: {problem}", hint=hint)
    plain = split_login(url)[0]
    host = plain.partition("://")[2].partition("/")[0]
    port = re.fullmatch(r"(?:\[[^\]]*\]|[^:\[\]]*)(?::(\d*))?", host, re.ASCII)
    if port is None or int(port[1] or 0) > _LARGEST_PORT:
        message = f"{name} is no URL: its port is no number from 1 to {_LARGEST_PORT}"
        raise BadRequest(message, hint=hint)


@lru_cache
def split_login(endpoint: str) -> tuple[str, str | None]:
    """An endpoint's URL without the `user:password@` in it, and that.

    However a URL is spelled, it comes out as one: no other spelling is another endpoint.

    Raises:
        BadRequest: it is no URL; a password in it ends the host's part of the URL.
    """
    try:
        urlsplit(endpoint)
    except ValueError as error:
        hint = "write it as https://huggingface.co or http://127.0.0.1:8000"
        raise BadRequest(f"HF_ENDPOINT is no URL: {error}", hint=hint) from error
    scheme, mark, rest = endpoint.partition("://") if "://" in endpoint else ("", "", endpoint)
    host = rest.partition("/")[0]
    if "@" in host:
        login, _, name = host.rpartition("@")
        return _spell(f"{scheme}{mark}{name}{rest[len(host) :]}"), login
    if "@" in rest and re.search(r"^[^\[]*:(?!\d*$)", host):
        # Not even its message may hold what stands there.
        raise BadRequest(
            "HF_ENDPOINT is no URL: the password in it holds a slash",
            hint="write / as %2F and @ as %40 in a user's name and password",
        )
    return _spell(endpoint), None


def _spell(endpoint: str) -> str:
    """A URL in the one way in which we write it: no large letters in a host, no port that is the
    scheme's own, no slash at the end."""
    found = _URL.fullmatch(endpoint)
    if found is None:
        return endpoint.rstrip("/")
    scheme, host, port, path = found.groups()
    scheme, host = scheme.lower(), host.lower()
    port = "" if port is None or port.lstrip("0") in {"", _PORTS[scheme]} else f":{port}"
    return f"{scheme}://{host}{port}{path.rstrip('/')}"


def read_serve_token(env: Mapping[str, str] | None = None) -> str | None:
    """The token of an endpoint that is served from here, `HUBAOTI_SERVE_TOKEN`; no other process
    is told of it."""
    env = os.environ if env is None else env
    return env.get("HUBAOTI_SERVE_TOKEN", "").strip() or None


def read_upstream_token(upstream: str, env: Mapping[str, str] | None = None) -> str | None:
    """The token for the endpoint that ours pulls through: `HUBAOTI_UPSTREAM_TOKEN`.

    Or, as huggingface_hub finds one, `HF_TOKEN` and then its file, which are for the endpoint that
    `HF_ENDPOINT` names: another upstream is not told of them.
    """
    env = os.environ if env is None else env
    if own := env.get("HUBAOTI_UPSTREAM_TOKEN", "").strip():
        return own
    if _spell(env.get("HF_ENDPOINT") or ENDPOINT) != _spell(upstream):
        return None
    if found := "".join(env.get("HF_TOKEN", "").split()):
        return found
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    file = Path(env.get("HF_TOKEN_PATH") or Path(home) / "token")
    try:
        return "".join(read_small(file.expanduser(), _LARGEST_TOKEN).decode().split()) or None
    except (OSError, ValueError, RuntimeError):  # RuntimeError where nobody knows the home
        return None


def hide_secrets(text: str) -> str:
    """A text for others to read: without what the environment, or a login, says in confidence."""
    for name in _TOKENS:
        words = os.environ.get(name, "").split()
        for secret in {*words, "".join(words), *(repr(word)[1:-1] for word in words)} - {""}:
            text = text.replace(secret, "(token)")
    return _SECRET.sub("(token)", text)


def _find_kernel_cache(env: Mapping[str, str], cache: Path) -> Path:
    """The folder of the kernels library, by default huggingface_hub's, as both of them read it."""
    names = ("KERNELS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    value = next((env[name] for name in names if env.get(name)), None)
    folder = Path(value) if value else Path(env.get("HF_HOME") or cache / "huggingface") / "hub"
    return _find_home(folder, "HF_HOME").absolute()


def read_library_paths() -> tuple[list[str], list[str]]:
    """The folders in which this process's children look for libraries, when loading and linking."""
    loaded, linked = (os.environ.get(name, "") for name in ("LD_LIBRARY_PATH", "LIBRARY_PATH"))
    return [*filter(None, loaded.split(":"))], [*filter(None, linked.split(":"))]


def read_compilers() -> dict[str, str]:
    """The compilers that `CC` and `CXX` name, by these: triton's and torch's."""
    return {name: os.environ[name] for name in ("CC", "CXX") if name in os.environ}


def list_kernel_tuning(env: Mapping[str, str] | None = None) -> list[str]:
    """The variables that change the kernels of a graph for a GPU, which no key would know of."""
    env = os.environ if env is None else env
    return sorted(name for name, value in env.items() if value and _KERNELS.fullmatch(name))


def merge_environment(values: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process with other values laid over it, for a process of ours."""
    return {**os.environ, **values}


def read_needed_environment() -> dict[str, str]:
    """What of this process's environment a process is told that runs somebody's graph.

    It is what a list allows, and nothing whose name says that it is a secret.
    """
    names = (name for name in os.environ if _NEEDED.fullmatch(name))
    return {name: os.environ[name] for name in names if not _SECRET_NAME.search(name)}


@contextmanager
def override_environment(**values: str | None) -> Iterator[None]:
    """Set variables for a while, for libraries that can be told in no other way; None unsets."""
    before = {name: os.environ.get(name) for name in values}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
