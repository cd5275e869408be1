#!/usr/bin/env python3
"""What has to work with every supported torch and transformers: a fixed list, by public words only.

`scripts/matrix` runs it with the Python of each of its environments. A line of JSON for each check,
as soon as it is known; the exit code is 1 when one failed. By hand: `tests/smoke.py [NAME ...]`.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.mirror import Mirror
from hubaoti.server import serve_in_thread
from hubaoti.settings import Settings

TEXTS = ("A cat sits on the mat.", "A kitten rests on a rug, as kittens do.", "Rates rose.")
REPO = "local/smoke"
PLACES = 32  # of a cache


class Gated(nn.Module):
    """A module that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.nn.functional.gelu(self.wide(x))
        return x + scale * self.narrow(hidden), hidden.mean(-1)


class Smoke:
    """The checks, and what several of them need: made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(home=folder / "home", endpoint="http://127.0.0.1:9")

    @cached_property
    def bert(self) -> Path:
        """An encoder of random weights, with a tokenizer that knows whole words."""
        torch.manual_seed(7)
        words = ["[PAD]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]
        config = transformers.BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        folder = self.folder / "bert"
        make_model("BertModel", config).save_pretrained(folder)
        model = WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = WhitespaceSplit()
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    @cached_property
    def decoder(self) -> Path:
        """A language model of two equal blocks, of random weights."""
        torch.manual_seed(7)
        config = transformers.LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        folder = self.folder / "decoder"
        make_model("LlamaForCausalLM", config).save_pretrained(folder)
        return folder

    @cached_property
    def blocks(self) -> Bundle:
        """Its blocks, with their KV cache among their inputs."""
        dims = {"batch": (1, 2), "seq": (1, 16), "cache": (8, 64)}
        return hubaoti.compile(
            self.decoder, self.folder / "blocks", task="generate", dims=dims, settings=self.settings
        )

    def load_model(self) -> Any:
        """The language model, anew."""
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(self.decoder)
        return model.eval()

    def check_encoder(self) -> None:
        """A whole encoder answers texts as transformers does."""
        bundle = hubaoti.compile(self.bert, self.folder / "whole", settings=self.settings)
        found = hubaoti.load(self.find_in_mirror(bundle), self.bert, settings=self.settings)(TEXTS)
        expected = hubaoti.eager(self.bert, TEXTS, settings=self.settings).values
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    def check_block(self) -> None:
        """Prefill and two steps over a static cache are answered by graphs."""
        plain, model = self.load_model(), self.load_model()
        with hubaoti.attach(model, self.blocks, strict=True, settings=self.settings) as attachment:
            torch.testing.assert_close(run_steps(model), run_steps(plain), atol=1e-4, rtol=1e-4)
            require_served(attachment, 6)

    def check_generate(self) -> None:
        """Plain `generate` says what it says without graphs."""
        plain, model = self.load_model(), self.load_model()
        with hubaoti.attach(model, self.blocks, settings=self.settings) as attachment:
            assert torch.equal(generate_tokens(model), generate_tokens(plain)), "other tokens"
            require_served(attachment, 20)

    def check_attach(self) -> None:
        """A module from Python, captured, attached, detached."""
        module = Gated().eval()
        with torch.no_grad(), hubaoti.capture(module) as calls:
            for rows in (2, 5, 9):
                module(torch.randn(rows, 16), scale=0.5)
        bundle = hubaoti.compile(module, self.folder / "gated", calls=calls, settings=self.settings)
        x = torch.randn(7, 16)
        with torch.no_grad():
            expected = module(x, scale=0.5)
            with hubaoti.attach(module, bundle, settings=self.settings) as attachment:
                for _ in range(2):  # the first is compared with the module's own
                    found = module(x, scale=0.5)
                assert attachment.stats()["compiled"] >= 1, attachment.stats()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert "forward" not in vars(module), "detached, it is not as it was"

    def check_pull(self) -> None:
        """What is pushed is pulled into another home, opened in a child, and attached."""
        with serve_in_thread(self.folder / "hub") as endpoint:
            here = Settings(self.folder / "home", endpoint.url, endpoint.token)
            there = Settings(self.folder / "other", endpoint.url)
            commit = hubaoti.push(self.blocks, REPO, tag="v1", settings=here)
            pulled = hubaoti.pull(f"{REPO}@v1", trust=True, settings=there)
            assert pulled.commit == commit.commit
            plain, model = self.load_model(), self.load_model()
            with hubaoti.attach(model, pulled, settings=there) as attachment:
                assert torch.equal(generate_tokens(model), generate_tokens(plain)), "other tokens"
                require_served(attachment, 20)

    def find_in_mirror(self, bundle: Bundle) -> Any:
        """An artifact of the mirror."""
        with Mirror.open(self.settings.mirror) as mirror:
            artifact = mirror.artifact(bundle.manifest.digest)
        assert artifact is not None
        return artifact


CHECKS: dict[str, Callable[[Smoke], None]] = {
    "encoder": Smoke.check_encoder,
    "block": Smoke.check_block,
    "generate": Smoke.check_generate,
    "attach": Smoke.check_attach,
    "pull": Smoke.check_pull,
}


def make_model(kind: str, config: Any) -> Any:
    """A model of random weights."""
    return getattr(transformers, kind)(config)


@torch.no_grad()
def run_steps(model: Any) -> torch.Tensor:
    """The logits of a prefill and two steps over one static cache."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=PLACES)
    word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    parts = [ids[:, :4], ids[:, 4:5], ids[:, 5:]]
    return torch.cat([model(part, **{word: cache}).logits for part in parts], 1)


def generate_tokens(model: Any) -> torch.Tensor:
    """Ten greedy tokens, over a static cache."""
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    found: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **options
    )
    return found


def require_served(attachment: Any, calls: int) -> None:
    """See that graphs answered so many calls, and the module none."""
    stats = attachment.stats()
    assert (stats["compiled"], stats["eager"]) == (calls, 0), stats


def run_check(name: str, smoke: Smoke) -> dict[str, Any]:
    """One check's line: its seconds, and what was wrong."""
    started, message = time.perf_counter(), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # as of a keyword that goes
            CHECKS[name](smoke)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"[:300]
    return {"check": name, "seconds": round(time.perf_counter() - started, 1), "error": message}


def main(names: list[str]) -> int:
    """Every check, or those that are named."""
    failed = 0
    versions = {each.__name__: each.__version__ for each in (torch, transformers, huggingface_hub)}
    sys.stdout.write(json.dumps(versions) + "\n")
    with tempfile.TemporaryDirectory(prefix="hubaoti-smoke-") as folder:
        smoke = Smoke(Path(folder))
        for name in names or CHECKS:
            line = run_check(name, smoke)
            failed += bool(line["error"])
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
