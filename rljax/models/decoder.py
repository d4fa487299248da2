"""The decoder that all families share: embed, scan over stacked layers, norm, hidden states out."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.models.attention import Attend, Cache, full_attend
from rljax.models.kernels import choose, kernel_attend
from rljax.models.layers import (
    PRODUCT,
    Param,
    Rope,
    RopeScaling,
    contract,
    dot,
    make_rope,
    rms_norm,
    rope_frequencies,
    rotate,
    swiglu,
    wide_dtype,
)
from rljax.models.quantized import Quantized
from rljax.sharding import VOCAB_BLOCK, Layout

Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What every family has. All of it comes from the checkpoint's config.json; nothing has a default."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    tied_embeddings: bool
    init_std: float
    sliding_window: int | None
    vocab_multiple: int = VOCAB_BLOCK  # not a model constant: how far the tables are padded for the mesh at hand

    @property
    def padded_vocab(self) -> int:
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5


Block = Callable[[Params, Float[Array, "b t d"], Rope, Attend, Any, Any], tuple[Float[Array, "b t d"], Any]]


class HfKey(NamedTuple):
    """Where a leaf lives in a Hugging Face checkpoint; ``{layer}`` in ``name`` marks one tensor per layer.

    ``kind`` says how a stored tensor becomes a leaf's layer: same, transposed ([out, in] to [in, out]), heads_out
    ([N*H, D] to [D, N, H]), heads_in ([D, N*H] to [N, H, D]) or heads_bias ([N*H] to [N, H]).
    """

    name: str
    kind: str


class Family(Protocol):
    """A family is a module with these names. ``Config`` is DecoderConfig, or a subclass where a family has more."""

    Config: type[DecoderConfig]

    def from_hf(self, config: dict) -> DecoderConfig: ...
    def to_hf(self, config: Any) -> dict: ...
    def declare_layer(self, config: Any) -> dict[str, Param]: ...
    def block(
        self, config: Any, layout: Layout, w: Params, x: Array, rope: Rope, attend: Attend, cache: Any, layer: Array
    ) -> tuple[Array, Any]: ...
    def hf_keys(self, config: Any) -> dict[str, HfKey]: ...


class Model(NamedTuple):
    """A family and its config: static, hashable, what a compiled program closes over."""

    family: Any
    config: DecoderConfig
    scores: int = 0  # numbers a token from a scalar head (critics, reward models); 0: a language model

    def padded_for(self, *tensor_degrees: int) -> "Model":
        """The same model with tables padded so that every given tensor degree divides them in whole blocks."""
        multiple = VOCAB_BLOCK * math.lcm(*tensor_degrees)
        return self._replace(config=dataclasses.replace(self.config, vocab_multiple=multiple))


def declare_attention(c: DecoderConfig) -> dict[str, Param]:
    return {
        "attention_norm": Param((c.width,), (None,), "ones"),
        "q": Param((c.width, c.num_heads, c.head_dim), ("embed", "heads", None), summed=1),
        "k": Param((c.width, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", None), summed=1),
        "v": Param((c.width, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", None), summed=1),
        "o": Param((c.num_heads, c.head_dim, c.width), ("heads", None, "embed"), summed=2),
    }


def declare_ffn(c: DecoderConfig) -> dict[str, Param]:
    return {
        "ffn_norm": Param((c.width,), (None,), "ones"),
        "gate": Param((c.width, c.ffn_width), ("embed", "ffn"), summed=1),
        "up": Param((c.width, c.ffn_width), ("embed", "ffn"), summed=1),
        "down": Param((c.ffn_width, c.width), ("ffn", "embed"), summed=1),
    }


def attention_sublayer(
    c: DecoderConfig,
    layout: Layout,
    w: Params,
    x: Array,
    rope: Rope,
    attend: Attend,
    cache: Any,
    layer: Array,
    adjust: Callable[[str, Array], Array] = lambda name, heads: heads,
) -> tuple[Float[Array, "b t d"], Any]:
    """x + attention(norm(x)). ``adjust`` is a family's touch on q, k and v before rotation: biases, per-head norms."""
    h = rms_norm(x, w["attention_norm"], c.norm_eps)
    if cache is not None:
        w = {**w, **{name: jax.tree.map(partial(_heads_first, layout), w[name]) for name in ("q", "k", "v")}}
    q, k, v = (adjust(name, dot(h, w[name])) for name in ("q", "k", "v"))
    q = layout.constrain(rotate(q, rope), "batch", None, "heads", None)
    out, cache = attend(q, rotate(k, rope), v, cache, layer)
    return layout.constrain(x + dot(out, w["o"], 2), "batch", None, None), cache


def _heads_first(layout: Layout, w: Array) -> Array:
    """As decoding reads them: the compiler laid those of all layers out again, for prefill and back, at every token."""
    return layout.in_memory(w, (None, "heads", None), (1, 0, 2)) if w.ndim == 3 else w


def ffn_sublayer(c: DecoderConfig, layout: Layout, w: Params, x: Array) -> Float[Array, "b t d"]:
    return layout.constrain(x + swiglu(w, rms_norm(x, w["ffn_norm"], c.norm_eps)), "batch", None, None)


REMAT_POLICIES = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


def forward(
    model: Model,
    layout: Layout,
    params: Params,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    attend: Attend,
    cache: Any = None,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> tuple[Float[Array, "b t d"], Any]:
    """Hidden states after the final norm, and the cache. Heads and log-probs are taken from these, in chunks.

    ``remat`` names what the backward pass finds kept of a block: none (remat; everything is), block (its input), dots
    (its products with weights, not attention's).
    """
    c = model.config
    x = layout.constrain(params["embed"][tokens].astype(dtype), "batch", None, None)
    rope = make_rope(positions, rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
    block: Block = partial(model.family.block, c, layout)
    if REMAT_POLICIES[remat] is not None:
        block = jax.checkpoint(block, policy=REMAT_POLICIES[remat], static_argnums=(3,))

    def step(carry: tuple[Array, Any], xs: tuple[Params, Array]) -> tuple[tuple[Array, Any], None]:
        w, layer = xs
        return block(w, carry[0], rope, attend, carry[1], layer), None

    if isinstance(params["layers"], list):
        caches = []
        for w, mine in zip(params["layers"], cache, strict=True):
            x, mine = block(w, x, rope, attend, mine, None)
            caches.append(mine)
        return rms_norm(x, params["final_norm"], c.norm_eps), caches
    layers = jnp.arange(c.num_layers)
    (x, cache), _ = jax.lax.scan(step, (x, cache), (params["layers"], layers))
    return rms_norm(x, params["final_norm"], c.norm_eps), cache


def by_layer(stack: Any) -> list[Any]:
    """Layers apart instead of in a stack, of weights or of a cache, for a loop of tokens on CPUs.

    XLA's CPU backend copies whatever a product takes out of a stack, at every token; that costs more than reading it.
    """
    count = len(jax.tree.leaves(stack)[0])
    return [jax.tree.map(lambda x: x[i], stack) for i in range(count)]  # noqa: B023


def head_table(params: Params) -> Float[Array, "v d"]:
    """The output table; the embedding itself where they are tied."""
    return params["lm_head"] if "lm_head" in params else params["embed"]


def logits(model: Model, params: Params, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
    """Float32 logits over the padded vocabulary, minus infinity at the padding. For decoding; training takes chunks."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return vocabulary_logits(model, params, flat).T.reshape(*hidden.shape[:-1], -1)


def vocabulary_logits(model: Model, params: Params, hidden: Float[Array, "b d"]) -> Float[Array, "v b"]:
    """The same with the vocabulary first, as the table has it."""
    table = head_table(params).astype(hidden.dtype)
    scores = contract("zy,ay->za", table, hidden, wide_dtype(hidden.dtype))
    if table.shape[0] == model.config.vocab_size:
        return scores
    return jnp.where(jnp.arange(table.shape[0])[:, None] < model.config.vocab_size, scores, -jnp.inf)


def scalar_scores(params: Params, hidden: Float[Array, "b t d"]) -> Float[Array, "b t"] | Float[Array, "b t n"]:
    """What a critic's or reward model's head says at each token, in float32; [b t] where it says one number."""
    wide = wide_dtype(hidden.dtype)
    scores = contract("abu,xu->abx", hidden, params["score"], wide) + params["score_bias"].astype(wide)
    return scores[..., 0] if scores.shape[-1] == 1 else scores


def empty_cache(model: Model, layout: Layout, rows: int, length: int, dtype: Any) -> Cache:
    """Zeros for ``rows`` rows; kv heads repeated to the tensor degree where that is larger. int8 rows have scales."""
    c = model.config
    heads = max(c.num_kv_heads, layout.tensor)
    shape = (c.num_layers, rows, heads, length, c.head_dim)

    def zeros(shape: tuple[int, ...], dtype: Any) -> Array:
        return layout.constrain(jnp.zeros(shape, dtype), None, "batch", "kv_heads", *(None,) * (len(shape) - 3))

    if dtype == jnp.int8:
        return Cache(*(Quantized(zeros(shape, dtype), zeros(shape[:-1], jnp.float32)) for _ in range(2)))
    return Cache(*(zeros(shape, dtype) for _ in range(2)))


def check_tensor_degree(config: DecoderConfig, tensor: int) -> None:
    """Raises ValueError listing the valid degrees where heads do not divide."""

    def divides(degree: int) -> bool:
        kv = config.num_kv_heads
        return config.num_heads % degree == 0 and (kv % degree == 0 or degree % kv == 0)

    if not divides(tensor):
        valid = [degree for degree in range(1, config.num_heads + 1) if divides(degree)]
        raise ValueError(
            f"mesh: a tensor degree of {tensor} does not divide {config.num_heads} query heads over "
            f"{config.num_kv_heads} kv heads; valid degrees are {', '.join(map(str, valid))}"
        )


def hidden_states(
    model: Model,
    layout: Layout,
    params: Params,
    tokens: Int[Array, "b t"],
    segments: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str = "xla",
) -> Float[Array, "b t d"]:
    """Whole rows through the decoder, as training and scoring do. ``segments`` is 0 at padding, else a row's part.

    ``attention`` names a kernel, or auto (``kernels.choose``).
    """
    c = model.config
    kernel = choose(attention, layout, dtype, tokens.shape[1], c.head_dim)
    if kernel == "xla":
        attend = full_attend(positions, segments, c.sliding_window, layout, c.attention_scale)
    else:
        attend = kernel_attend(kernel, segments, c.sliding_window, layout, c.attention_scale)
    return forward(model, layout, params, tokens, positions, attend, dtype=dtype, remat=remat)[0]


def row_positions(valid: Array) -> Int[Array, "b t"]:
    """0, 1, 2, ... over the real tokens of each row, whatever padding stands before them."""
    return jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0).astype(jnp.int32)
