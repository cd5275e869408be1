"""What people write today, from the process's start to the first vector.

Run as a program: the folder of a model, `eager` or `compile`, a text.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModel, AutoTokenizer


def main() -> None:
    """Embed one text."""
    folder, mode, text = sys.argv[1:]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    model.eval()
    if mode == "compile":
        model = torch.compile(model, dynamic=True)
    with torch.no_grad():
        inputs = tokenizer([text], padding=True, return_tensors="pt")
        hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
        vector = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    sys.stdout.write(f"{vector[0, :4].tolist()}\n")


if __name__ == "__main__":
    main()
