"""A fresh process to its first token: a model of random weights, attached or compiled by torch.

    python tests/gpu/tokens.py DEVICE CONFIG attach BUNDLE
    python tests/gpu/tokens.py DEVICE CONFIG compile

Says as JSON the seconds since its first line: torch and transformers imported, the model made, the
first token there. Whatever is asked of `torch.compile` has the cache that its environment names.
"""

from __future__ import annotations

import time

_START = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402

from gpu import llama  # noqa: E402


def main() -> None:
    """Make the model, prepare it as asked, and generate."""
    found = {"imported": time.perf_counter() - _START}
    device, how = torch.device(sys.argv[1]), sys.argv[3]
    model = llama.make_model(device, transformers.AutoConfig.from_pretrained(sys.argv[2]))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found["model"] = time.perf_counter() - _START
    if how == "attach":
        import hubaoti

        hubaoti.attach(model, Path(sys.argv[4]), strict=True, trust=True)
    else:
        for block in model.model.layers:
            block.compile(dynamic=True)
    found["prepared"] = time.perf_counter() - _START
    model.generate(llama.make_prompt(model), **llama.GREEDY, max_new_tokens=1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found["token"] = time.perf_counter() - _START
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
