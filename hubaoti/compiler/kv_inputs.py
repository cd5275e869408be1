"""KV caches whose tensors belong to somebody else: the inputs of a region, written in place.

Both kinds have transformers' face, so a decoder block takes them as it takes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hubaoti.errors import CompileFailed
from hubaoti.program.silence import silence_torchao
from hubaoti.runtime.attention_ops import call_decode
from hubaoti.runtime.call_template import CAUSAL
from hubaoti.runtime.kv_cache import SLIDING, find_layer_numbers

ATTENTION = "hubaoti_sdpa"
UNMASKED = "hubaoti_unmasked"
TOLD = {"causal": "hubaoti_causal", "padded": "hubaoti_padded"}  # by what masks may say
_LAYER = "hubaoti_layer"  # what keys have that are not in their cache yet
_ANY_LENGTH = 1 << 40  # of a cache that nothing is put into
# What sdpa takes beside its tensors, and what blocks pass along that no attention computes with:
# the mask has the window already.
_KNOWN = {"dropout", "scaling", "is_causal"}
_OF_SDPA = {"cache", "position_bias", "softcap"}  # transformers' own takes or refuses them
HARMLESS = {
    "cache_position",
    "layer_idx",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "sliding_window",
    "use_cache",
}


class Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What all our layers answer: how much is filled, and how long the mask is."""

    is_compileable = True

    def __init__(self, filled: Any, seq: Any, sliding: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.filled, self.seq, self.is_sliding = filled, seq, sliding
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to make: the tensors of the cache are there already."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what a mask covers."""
        return self.filled, 0

    def get_seq_length(self) -> int:
        """How much was filled before this call."""
        length: int = self.filled - self.seq
        return length

    def get_max_length(self) -> int:
        """No more than this is ever asked for."""
        length: int = self.filled
        return length


class Seen(Layer, LinearAttentionLayer):  # type: ignore[no-untyped-call]
    """Notes what a block puts into its cache, and answers with tensors of the filled length.

    Recurrent states are kept as transformers keep them, so that a model that has some runs.
    """

    def __init__(self, filled: int, seq: int) -> None:
        Layer.__init__(self, filled, seq)
        LinearAttentionLayer.__init__(self)
        self.puts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.states = 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of states; keys and values have no tensors here."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep a state, and note that there is one."""
        self.states += 1
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep a state, and note that there is one."""
        self.states += 1
        return super().update_recurrent_state(*args, **kwargs)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as if the cache held `filled` of them."""
        self.puts.append((key_states, value_states))
        return self._lengthen(key_states), self._lengthen(value_states)

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """An index of keys, as some attention chooses by, is more than keys and values, too."""
        self.states += 1
        return self._lengthen(indexer_key_states)

    def _lengthen(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_empty(*states.shape[:-2], self.filled, states.shape[-1])


class _Written(Layer):  # type: ignore[no-untyped-call]
    """A layer whose keys and values, `held`, are somebody else's, and written in place."""

    held: tuple[torch.Tensor, torch.Tensor]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that attention looks at, of which those given are now a part."""
        return self._put(self.held[0], key_states), self._put(self.held[1], value_states)

    def _put(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Static(_Written):  # type: ignore[no-untyped-call]
    """New entries go to `position`; what is looked at are the first `filled` places."""

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, filled: Any
    ) -> None:
        super().__init__(filled, position.shape[0])
        self.held, self.position = (keys, values), position

    def _put(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Narrowed in here, and not by the caller: a graph does not check its inputs' strides."""
        torch._check(self.filled <= held.shape[2])  # type: ignore[no-untyped-call]
        held.index_copy_(2, self.position, new)
        return held.narrow(2, 0, self.filled)


class Told(Static):  # type: ignore[no-untyped-call]
    """A static layer whose new entries attention itself puts into it, told where by lengths."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values as they are; the keys say whose they are."""
        torch._check(self.filled <= self.held[0].shape[2])  # type: ignore[no-untyped-call]
        setattr(key_states, _LAYER, self)
        return key_states, value_states


class Sliding(_Written):  # type: ignore[no-untyped-call]
    """A full window: the oldest entries leave, `cache+seq-1` places are looked at.

    One that becomes full in the call is made to look so before, by `runtime/kv_cache.py`. As
    transformers' StaticSlidingWindowLayer does it once it is full (cache_utils, 5.22).
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, seq: Any, looked: Any = None
    ) -> None:
        """`looked` is the mask's length, if there is a mask: `cache+seq-1`, but to torch a number
        of its own, of which it knows that twice as much is more."""
        super().__init__(keys.shape[2] + seq - 1 if looked is None else looked, seq, sliding=True)
        self.held = (keys, values)

    def _put(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """All of a full window but its oldest entry, and then the new ones; the last ones stay."""
        window = held.shape[2]
        places = torch.arange(self.filled, device=held.device)
        old = held.index_select(2, (places + 1).clamp(max=window - 1))
        came = new.index_select(2, (places - window + 1).clamp(min=0))
        whole = torch.where((places < window - 1)[:, None], old, came)
        stay = torch.arange(window, device=held.device) + self.seq - 1
        held.copy_(whole.index_select(2, stay))
        return whole


def make_cache(layer: Layer, layers: int) -> Cache:
    """A cache that has this one layer wherever a block looks for its own."""
    return Cache(layers=[layer] * layers)


def make_recording_cache(filled: int, seq: int, layers: int) -> Cache:
    """A cache for looking at a model: each layer notes what it is given."""
    return Cache(layers=[Seen(filled, seq) for _ in range(layers)])


def count_layers(module: nn.Module) -> int:
    """One more than the largest layer number in a module."""
    return max(find_layer_numbers(module), default=0) + 1


def find_layer_window(config: Any, index: int) -> int | None:
    """How many places a layer's static cache has at most, where it does not keep everything.

    transformers itself says so, of windows and chunks alike.
    """
    try:
        layer: Any = StaticCache(config=config, max_cache_len=_ANY_LENGTH).layers[index]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None  # it makes no such cache of this config
    sliding = type(layer).__name__ in SLIDING
    return int(layer.max_cache_len) if sliding and layer.max_cache_len < _ANY_LENGTH else None


def attend_grouped(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa, but over the cache itself where heads are grouped.

    transformers repeats the keys and values of a group in memory whenever there is a mask, which
    costs more than all the rest of a decoding step.

    Raises:
        CompileFailed: it is given something that it does not know, and would have to leave out.
    """
    if attention_mask is None or query.shape[1] == key.shape[1]:
        _refuse_unknown({name: rest[name] for name in rest.keys() - _OF_SDPA})
        answer: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **rest
        )
        return answer
    _refuse_unknown(rest)
    tensors, scale = (query, key, value, attention_mask), rest.get("scaling")
    length: Any = query.shape[2]
    if isinstance(length, int) and length == 1:  # in every call, as in a bucket of decoding steps
        looked = _attend_one_token(*tensors, scale)
    else:
        looked = nn.functional.scaled_dot_product_attention(*tensors, scale=scale, enable_gqa=True)
    return looked.transpose(1, 2).contiguous(), None


def attend_unmasked(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one token to all that is there, whatever its mask says.

    Raises:
        CompileFailed: as `attend_grouped` does.
    """
    _refuse_unknown(rest)
    return _attend_all(query, key, value, rest.get("scaling"), is_causal=False)


def attend_causal(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of as many tokens as there are keys to those before them, whatever the mask says.

    What of a block looks at something else, as at what an encoder saw, is as `attend_grouped` has
    it.

    Raises:
        CompileFailed: as `attend_grouped` does.
    """
    if not _is_causal(module):
        return attend_grouped(module, query, key, value, attention_mask, **rest)
    _refuse_unknown(rest)
    return _attend_all(query, key, value, rest.get("scaling"), is_causal=True)


def _attend_all(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    *,
    is_causal: bool,
) -> tuple[torch.Tensor, None]:
    """Attention without a mask."""
    is_grouped = query.shape[1] != key.shape[1]
    looked = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
    )
    return looked.transpose(1, 2).contiguous(), None


def attend_padded(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a cache of which a text has all places from its first, one row one more.

    What of the mask is looked at is its last row: how many places it leaves out. What of a block
    looks at something else is as `attend_grouped` has it.

    Raises:
        CompileFailed: as `attend_grouped` does; or the keys are not those that go into the cache.
    """
    if not _is_causal(module):
        return attend_grouped(module, query, key, value, attention_mask, **rest)
    _refuse_unknown(rest)
    layer: Told | None = getattr(key, _LAYER, None)
    if layer is None or attention_mask is None:
        raise CompileFailed(
            "capture: the attention looks at other keys than it puts into its cache",
            hint="compile it with --attention sdpa",
        )
    used = layer.position[:1].int().repeat(query.shape[0])
    leftpad = (attention_mask.shape[3] - attention_mask[:, 0, -1].sum(-1)).int()
    given = [each.transpose(1, 2) for each in (query, *layer.held, key, value)]
    return call_decode(given, used, leftpad, rest.get("scaling")), None


def _is_causal(module: nn.Module) -> bool:
    """Whether an attention looks at nothing that comes later, as transformers' sdpa asks for it."""
    return bool(getattr(module, CAUSAL, True))


def attends_by_lengths(module: nn.Module) -> bool:
    """Whether a module has that attention now; its parts ask their configs."""
    configs = (getattr(part, "config", None) for part in module.modules())
    return any(getattr(each, "_attn_implementation", "") == TOLD["padded"] for each in configs)


def find_unknown(rest: Mapping[str, Any]) -> set[str]:
    """What of the arguments of attention sdpa does not compute with, by name."""
    # A flag says what else to answer, as `output_router_logits` does.
    given = {name for name, item in rest.items() if item is not None and type(item) is not bool}
    return given - _KNOWN - HARMLESS


def _refuse_unknown(rest: Mapping[str, Any]) -> None:
    """Refuse what sdpa does not compute with."""
    if unknown := find_unknown(rest):
        raise CompileFailed(
            f"capture: the attention takes {', '.join(sorted(unknown))}, which sdpa does not",
            hint="this model's attention is compiled as transformers' eager one",
        )


def _attend_one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Attention of one token: the heads of a group are rows of one product.

    So keys and values are read once and not for each head (measured on a CPU: 0.63 ms in the place
    of 0.94 over 4096 places). Of more tokens the mask would have to be repeated.
    """
    groups = query.shape[1] // key.shape[1]
    batch, _, _, width = query.shape
    rows = query.reshape(batch, -1, groups, width)
    if mask.shape[1] == 1:
        mask = mask.expand(-1, -1, groups, -1)
    else:
        mask = mask.reshape(mask.shape[0], -1, groups, mask.shape[3])
    looked = nn.functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=mask, scale=scale
    )
    return looked.reshape(batch, -1, 1, value.shape[3])


def register_attention() -> None:
    """Make our attention known to transformers, with sdpa's masks."""
    with silence_torchao():  # the first look at this part of transformers brings torchao
        from transformers import AttentionInterface, AttentionMaskInterface
    kinds: dict[str, Callable[..., Any]] = {
        ATTENTION: attend_grouped,
        UNMASKED: attend_unmasked,
        TOLD["causal"]: attend_causal,
        TOLD["padded"]: attend_padded,
    }
    for name, attention in kinds.items():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, sdpa_mask)
