"""Texts through a causal language model: the same answers with graphs and without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.attachment.attach import Attachment
from hubaoti.engines import decoder as texts
from hubaoti.engines.decoder import Decoder, ServedSizes
from hubaoti.engines.messages import Item, Sampling
from hubaoti.engines.tokens import answer_by_length
from hubaoti.errors import BadInput, BadRequest, ModelNotFound, OutOfBounds, UnknownTask
from hubaoti.program.pooling import pool
from hubaoti.runtime.text import pad_rows
from hubaoti.settings import Settings

PROMPTS = ["A cat sits on", "hello", "the quick brown fox jumps over the lazy dog", "why", "so it"]
GREEDY = Sampling(max_new_tokens=8, do_sample=False)
ITEMS = [
    Item("A cat sits on", " the mat."),
    Item("A cat sits on", " a bank that lends money"),
    Item("hello ", "world"),
    Item("", "once upon a time"),
    Item("the quick brown fox jumps over the lazy", " dog"),
]


@pytest.fixture
def plain(tiny_decoder: Path) -> Decoder:
    """The decoder without graphs."""
    return Decoder(AutoModelForCausalLM.from_pretrained(tiny_decoder).eval(), tiny_decoder, ())


@pytest.fixture
def attachment(served: Decoder, decoder_bundle: Bundle, built_at: Settings) -> Iterator[Attachment]:
    with hubaoti.attach(served.model, decoder_bundle, settings=built_at) as found:
        served.serve(decoder_bundle.manifest)
        yield found


@pytest.fixture
def served(tiny_decoder: Path) -> Decoder:
    """The decoder with graphs, once `attachment` is asked for."""
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    return Decoder(model, tiny_decoder, ("mean",))


def alone(folder: Path, prompt: str, **words: Any) -> list[int]:
    """What transformers generates for one prompt, without padding."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **words}
    found: list[int] = model.generate(ids, **words)[0, ids.shape[1] :].tolist()
    return found


def test_prompts_of_different_lengths_are_answered_as_each_alone(
    tiny_decoder: Path, plain: Decoder, served: Decoder, attachment: Attachment
) -> None:
    expected = [alone(tiny_decoder, prompt) for prompt in PROMPTS]
    for each in (plain, served):
        found = each.generate(PROMPTS, GREEDY)
        assert [answer.tokens for answer in found] == expected
        assert {answer.finish for answer in found} == {"length"}
    # Five prompts are two batches of the graphs' four, each of eight steps through two blocks.
    stats = attachment.stats()
    assert (stats["compiled"], stats["eager"]) == (32, 0)


def test_an_answer_ends_at_its_end_token_and_not_at_that_of_another_row(
    tiny_decoder: Path, plain: Decoder
) -> None:
    free = [answer.tokens for answer in plain.generate(PROMPTS, GREEDY)]
    end = next(token for token in free[0][1:-1] if all(token not in row for row in free[1:]))
    plain.model.generation_config.eos_token_id = end
    found = plain.generate(PROMPTS, GREEDY)
    assert found[0].tokens == free[0][: free[0].index(end) + 1]
    assert [answer.tokens for answer in found[1:]] == free[1:]
    assert [answer.finish for answer in found] == ["stop"] + 4 * ["length"]


def test_padding_is_in_the_vocabulary_whatever_a_config_says(plain: Decoder) -> None:
    expected = [answer.tokens for answer in plain.generate(PROMPTS, GREEDY)]
    plain._tokenizer.pad_token = None
    plain.model.generation_config.pad_token_id = 50256
    assert [answer.tokens for answer in plain.generate(PROMPTS, GREEDY)] == expected


def test_a_text_to_stop_at_is_no_part_of_the_answer(plain: Decoder) -> None:
    free = plain.generate(["A cat sits on"], GREEDY)[0].text
    stop = free.split()[3]
    sampling = Sampling(max_new_tokens=8, do_sample=False, stop=(stop,))
    found = plain.generate(["A cat sits on"], sampling)[0]
    assert found.text == free[: free.index(stop)]
    assert found.finish == "stop"
    assert len(found.tokens) <= 4
    beside = plain.generate(["hello", "A cat sits on"], sampling)
    assert beside[1] == found, "what fills its row is no token of it"


def test_a_seed_samples_alike(plain: Decoder) -> None:
    def sampled(seed: int) -> list[list[int]]:
        words = Sampling(max_new_tokens=12, do_sample=True, temperature=2.0, seed=seed)
        return [answer.tokens for answer in plain.generate(PROMPTS, words)]

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4)


def test_what_a_generation_config_says_of_caches_and_lengths_does_no_harm(
    tiny_decoder: Path, decoder_bundle: Bundle
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    model.generation_config.cache_implementation = "static"
    model.generation_config.max_length = 5
    decoder = Decoder(model, tiny_decoder, ())
    for manifest in (None, decoder_bundle.manifest):
        decoder.serve(manifest)
        assert decoder.generate(["hello"], GREEDY)[0].tokens == alone(tiny_decoder, "hello")


def test_a_prompt_longer_than_the_cache_is_refused_before_anything_is_generated(
    plain: Decoder, served: Decoder, attachment: Attachment
) -> None:
    long = "word " * 30
    with pytest.raises(OutOfBounds, match=r"prompt 2 .* has 32 tokens and 40 .* 64 positions"):
        plain.generate(["hello", long], Sampling(max_new_tokens=40))
    served.served = ServedSizes(4, 16, 48)
    with pytest.raises(OutOfBounds, match=r"cache has up to 48 places") as refused:
        served.generate(["hello", long], Sampling(max_new_tokens=20))
    assert "--dim cache=16:52" in refused.value.hint
    assert attachment.stats()["compiled"] == 0


def test_messages_are_written_by_the_models_chat_template(plain: Decoder) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(BadRequest, match="no chat template"):
        plain.generate([messages], GREEDY)
    plain._tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }} said {% endfor %}"
    )
    (found,) = plain.generate([messages], GREEDY)
    assert found.prompt_tokens == 2, "what the template wrote, and no special token around it"


@pytest.mark.parametrize("prompt", ["", "half \ud83d"])
def test_a_prompt_that_is_none_is_refused(prompt: str, plain: Decoder) -> None:
    plain._tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(BadInput):
        plain.generate([prompt], GREEDY)


def reference(folder: Path, item: Item) -> tuple[float, int, bool]:
    """A likelihood as its definition says: one row, no padding, no cache."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = item.context.rstrip()
    text = context + item.context[len(context) :] + item.continuation
    first = tokenizer(context).input_ids[:-1] if context else [101]
    rest = tokenizer(text, add_special_tokens=False).input_ids
    rest = rest[len(first) - 1 :] if context else rest
    with torch.no_grad():
        logits = model(torch.tensor([first + rest])).logits[0].double()
    logprobs = torch.log_softmax(logits, -1)[len(first) - 1 : -1]
    picked = logprobs.gather(1, torch.tensor(rest).unsqueeze(1))
    return float(picked.sum()), len(rest), logprobs.argmax(1).tolist() == rest


def test_scores_are_those_of_each_continuation_alone(
    tiny_decoder: Path, plain: Decoder, served: Decoder, attachment: Attachment
) -> None:
    expected = [reference(tiny_decoder, item) for item in ITEMS]
    for each in (plain, served):
        found = each.score(ITEMS)
        for answer, (logprob, tokens, is_greedy) in zip(found, expected, strict=True):
            assert answer.logprob == pytest.approx(logprob, abs=1e-4)
            assert (answer.tokens, answer.is_greedy) == (tokens, is_greedy)
    assert attachment.stats()["eager"] == 0


def test_a_continuation_that_the_model_itself_would_choose_is_greedy(plain: Decoder) -> None:
    own = plain.generate(["hello"], GREEDY)[0]
    prompt = plain.prompt_ids("hello")
    with torch.no_grad():
        (found,) = plain._score_pairs([(prompt, own.tokens)])
        (other,) = plain._score_pairs([(prompt, [*own.tokens[:-1], own.tokens[-1] + 1])])
    assert found.is_greedy
    assert not other.is_greedy


def test_scoring_holds_few_logits_at_a_time(
    plain: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [answer.logprob for answer in plain.score(ITEMS)]
    seen: list[int] = []
    forward = plain.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].shape[0])
        return forward(*args, **kwargs)

    monkeypatch.setattr(plain.model, "forward", watched)
    monkeypatch.setattr(texts, "LOGITS", 1)
    found = [answer.logprob for answer in plain.score(ITEMS)]
    assert seen == [1] * len(ITEMS)
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_continuation_that_ends_a_token_of_its_context_is_scored_with_it(plain: Decoder) -> None:
    """ "sun" and "shine" are one token together."""
    first, rest = plain._split_item(Item("the sun", "shine"))
    assert first + rest == plain._encode("the sunshine")
    assert len(rest) == 1
    assert plain.score([Item("the sun", "shine")])[0].tokens == 1


def test_a_text_of_one_token_is_scored_where_nothing_begins_texts(plain: Decoder) -> None:
    """As with the tokenizers of GPT-2 and Qwen."""
    plain._begin = []
    found = plain.score([Item("sun", "shine"), Item("hello", " you")])
    assert [answer.tokens for answer in found] == [1, 1]


def test_a_continuation_without_a_token_is_refused(plain: Decoder) -> None:
    with pytest.raises(BadInput, match="no token"):
        plain.score([Item("hello", "")])
    with pytest.raises(OutOfBounds, match="item 2"):
        plain.score([Item("a", " b"), Item("word " * 50, "word " * 20)])


def test_texts_are_embedded_by_their_own_tokens_only(
    tiny_decoder: Path, served: Decoder, attachment: Attachment
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    found = served.embed(PROMPTS)
    for vector, prompt in zip(found, PROMPTS, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state
        torch.testing.assert_close(vector, pool("mean", hidden, torch.ones_like(ids))[0])
    assert attachment.stats()["eager"] == 0


def test_texts_are_embedded_as_the_model_s_sentence_files_say(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_decoder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    bare = Decoder(model, folder, ("mean",)).embed(["query: hello"])
    config = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    torch.testing.assert_close(Decoder(model, folder, ("mean",)).embed(["hello"]), bare)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    with pytest.raises(OutOfBounds, match="end a text at 8"):
        Decoder(model, folder, ("mean",)).embed(["word " * 9])
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(UnknownTask, match="do_lower_case"):
        Decoder(model, folder, ("mean",)).embed(["hello"])


def test_nothing_to_embed_is_refused(served: Decoder) -> None:
    with pytest.raises(BadInput, match="no text"):
        served.embed([])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, plain: Decoder) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelNotFound, match="tokenizer"):
        Decoder(plain.model, tmp_path, ())


def test_long_prompts_are_answered_beside_long_ones() -> None:
    batches: list[list[int]] = []

    def answer(batch: list[int]) -> list[str]:
        batches.append(batch)
        return [f"to {length}" for length in batch]

    found = answer_by_length([3, 9, 4, 8], 2, answer, lambda length: length)
    assert batches == [[9, 8], [4, 3]]
    assert found == ["to 3", "to 9", "to 4", "to 8"], "in their own order"
    ids, mask = pad_rows([[5], [6, 7]], 9, torch.device("cpu"), left=True)
    assert (ids.tolist(), mask.tolist()) == ([[9, 5], [6, 7]], [[0, 1], [1, 1]])


def test_a_cache_is_as_long_as_graphs_serve_it() -> None:
    assert [ServedSizes(1, 16, 64, 16).round_up(needed) for needed in (3, 16, 17, 64)] == [
        16,
        16,
        32,
        64,
    ]
