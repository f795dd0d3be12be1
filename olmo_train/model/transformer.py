"""The decoder-only transformer: embedding, blocks of attention and MLP, a final norm, the head.

The model knows nothing about the machine: parallel/ shards it and checkpoint/ saves it, both from outside.

Letters of shapes: B sequences, T tokens, C d_model, H query heads, K key and value heads, D head size, M mlp_hidden,
V padded vocabulary.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from olmo_train.model.config import ModelConfig
from olmo_train.model.loss import HeadLoss
from olmo_train.model.norms import NORMS


def rope_tables(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and pair, fp32, each (T, D) for positions (T,), (B, 1, T, D) for (B, 1, T).

    Half-split RoPE (Su et al. 2021): dimensions i and i + D/2 are rotated by the angle position / theta^(2i / D).
    """
    exponent = torch.arange(0, config.head_size, 2, device=positions.device, dtype=torch.float32) / config.head_size
    angles = positions.float()[..., None] * config.rope_theta**-exponent  # (..., T, D/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, T, D) by its positions, in fp32, as OLMo does."""
    x_fp32 = x.float()
    first, second = x_fp32.chunk(2, dim=-1)
    return (x_fp32 * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


Mask = Tensor | BlockMask | None  # None: plain causal attention
BLOCK = 128  # queries and keys of a block that flex attention skips as one; its default


def document_starts(documents: Tensor) -> Tensor:
    """The place in its row of the first token of each token's document, (B, T), for document numbers (B, T)."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(first, places, 0).cummax(dim=1).values


def document_mask(starts: Tensor) -> Mask:
    """The mask of causal attention within documents: query q sees the keys from starts[q] to q, for starts (B, T).

    Flex attention skips fully masked blocks; on a CPU it has no backward, so the mask there is dense.
    """
    if starts.is_cuda:
        return document_blocks(starts)
    places = torch.arange(starts.shape[1], device=starts.device)
    return (places <= places[:, None]) & (places >= starts[:, None, :, None])  # (B, 1, T, T)


def document_blocks(starts: Tensor) -> BlockMask:
    """document_mask as blocks, from the first and the last start in each block of queries. torch's create_block_mask would build
    the mask of all B x T x T pairs first."""
    B, T = starts.shape
    n = -(-T // BLOCK)
    padded = F.pad(starts, (0, n * BLOCK - T), value=T).view(B, n, BLOCK)  # no key is before the start of an absent query
    first, last = padded[..., :1], padded[..., -1:]  # (B, n, 1): starts grow along a row
    queries, keys = torch.arange(n, device=starts.device)[:, None], torch.arange(n, device=starts.device)
    full = (keys < queries) & (BLOCK * keys >= last)  # (B, n, n): each query of the block sees each key of the block
    part = (keys <= queries) & (BLOCK * (keys + 1) > first) & ~full  # (B, n, n): a query sees a key

    def counted(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The number of blocks in each row and their indices, (B, 1, n) and (B, 1, n, n), those that count first."""
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(dim=-1, dtype=torch.int32)[:, None], order.int()[:, None]

    sees = lambda b, h, q, k: (k <= q) & (k >= starts[b, q])  # noqa: E731
    of_queries, of_keys = (*counted(part), *counted(full)), (*counted(part.mT), *counted(full.mT))
    return BlockMask((T, T), *of_queries, *of_keys, (BLOCK, BLOCK), sees)


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)  # uncompiled it would store the full score matrix


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, (B, H, T, D), for q (B, H, T, D) and k, v (B, K, S, D), K a divisor of H."""
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def scaled(x: Tensor, factor: float) -> Tensor:
    """x times a factor, which is 1 under the standard parametrization."""
    return x if factor == 1 else x * factor


class Attention(nn.Module):
    """Causal attention of H query heads that share K key and value heads."""

    attend = staticmethod(attend)  # kernels.py may set another implementation

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        q, kv = config.n_heads * config.head_size, config.kv_heads * config.head_size
        self.wq = nn.Linear(config.d_model, q, bias=False)
        self.wk = nn.Linear(config.d_model, kv, bias=False)
        self.wv = nn.Linear(config.d_model, kv, bias=False)
        self.wo = nn.Linear(q, config.d_model, bias=False)
        norm = NORMS[config.norm]
        self.q_norm = norm(q, config.norm_eps, config.bias == "norm") if config.qk_norm else nn.Identity()
        self.k_norm = norm(kv, config.norm_eps, config.bias == "norm") if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.wq(x), self.wk(x), self.wv(x)  # (B, T, H * D), (B, T, K * D), (B, T, K * D)
        if (limit := self.config.clip_qkv) is not None:
            q, k, v = (y.clamp(-limit, limit) for y in (q, k, v))
        q = scaled(self.q_norm(q), self.config.query_multiplier)
        q = q.view(B, T, -1, self.config.head_size).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(k).view(B, T, -1, self.config.head_size).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, -1, self.config.head_size).transpose(1, 2)  # (B, K, T, D)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self, k, v)  # (B, K, past + T, D)
        out = self.attend(q, k, v, mask)  # (B, H, T, D)
        return self.wo(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    """w_down(act(w_gate(x)) * w_up(x)), or w_down(act(w_up(x))) without a gate."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.w_gate = nn.Linear(config.d_model, config.mlp_hidden, bias=False) if config.gated else None
        self.w_up = nn.Linear(config.d_model, config.mlp_hidden, bias=False)
        self.w_down = nn.Linear(config.mlp_hidden, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.w_gate is None:
            return self.w_down(self.activation(self.w_up(x)))  # (B, T, C)
        return self.w_down(self.activation(self.w_gate(x)) * self.w_up(x))  # (B, T, C)


# Applied to the gate where there is one (ModelConfig.gated).
ACTIVATIONS = {"swiglu": F.silu, "geglu": functools.partial(F.gelu, approximate="tanh"), "gelu": F.gelu}


class SequentialBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): OLMo, Llama, Gemma."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm = NORMS[config.norm](config.d_model, config.norm_eps, config.bias == "norm")
        self.attn = Attention(config)
        self.mlp_norm = NORMS[config.norm](config.d_model, config.norm_eps, config.bias == "norm")
        self.mlp = MLP(config)
        self.multiplier = 1 / config.depth_ratio

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: KVCache | None) -> Tensor:
        x = x + scaled(self.attn(self.attn_norm(x), rope, mask, cache), self.multiplier)
        return x + scaled(self.mlp(self.mlp_norm(x)), self.multiplier)


class ReorderedNormBlock(SequentialBlock):
    """x + norm(attention(x)), then x + norm(mlp(x)): OLMo 2 normalizes the output of a sub-layer, not its input."""

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: KVCache | None) -> Tensor:
        x = x + scaled(self.attn_norm(self.attn(x, rope, mask, cache)), self.multiplier)
        return x + scaled(self.mlp_norm(self.mlp(x)), self.multiplier)


class ParallelBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), with one norm: PaLM, Falcon-7B."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = NORMS[config.norm](config.d_model, config.norm_eps, config.bias == "norm")
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.multiplier = 1 / config.depth_ratio

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: KVCache | None) -> Tensor:
        normed = self.norm(x)
        attended = scaled(self.attn(normed, rope, mask, cache), self.multiplier)
        return x + attended + scaled(self.mlp(normed), self.multiplier)


BLOCKS = {"sequential": SequentialBlock, "parallel": ParallelBlock, "reordered_norm": ReorderedNormBlock}


class KVCache:
    """Keys and values of the tokens so far, by layer, so that generation computes them once."""

    def __init__(self) -> None:
        self.length = 0  # tokens that the model has seen
        self.kept: dict[Attention, tuple[Tensor, Tensor]] = {}

    def append(self, layer: Attention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v (B, K, T, D) of new tokens; returns those of all tokens so far, (B, K, past + T, D)."""
        if layer in self.kept:
            k, v = (torch.cat((old, new), dim=2) for old, new in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = (k, v)
        return k, v


class Head(nn.Linear):
    """The output matrix. Logits and loss are computed in its forward, so that FSDP can gather it for that time alone."""

    def forward(self, x: Tensor, labels: Tensor | None, loss: HeadLoss) -> Tensor:
        return logits_or_loss(x, self.weight, labels, loss)


def logits_or_loss(x: Tensor, weight: Tensor, labels: Tensor | None, loss: HeadLoss) -> Tensor:
    """x @ weight.T, (B, T, V), or its loss (B,) if there are labels, for x (B, T, C) and weight (V, C)."""
    return F.linear(x, weight) if labels is None else loss(x, weight, labels)


class Transformer(nn.Module):
    """A language model. Built on the meta device it takes no memory; init.py computes its initial values."""

    document_mask = staticmethod(document_mask)  # kernels.py may set another one, for the attention that it sets

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_rows, config.d_model)
        self.blocks = nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.n_layers))
        self.norm = NORMS[config.norm](config.d_model, config.norm_eps, config.bias == "norm")
        self.head = None if config.tie_embeddings else Head(config.d_model, config.vocab_rows, bias=False)
        self.loss = HeadLoss(config.z_loss)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of input_ids (B, T); with labels (B, T), the summed loss of each sequence, fp32 (B,).

        A label is the next token, or IGNORE. The loss is the cross-entropy in nats. `documents` (B, T): the number of each
        token's document; attention and positions then stay within a document.
        """
        rope, mask = self._positions(input_ids, documents, cache)
        x = self.embed(input_ids)  # (B, T, C)
        if self.config.embedding_scale:
            x = x * torch.tensor(math.sqrt(self.config.d_model), dtype=x.dtype)
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += input_ids.shape[1]
        x = scaled(self.norm(x), 1 / self.config.width_ratio)
        if self.head is None:
            return logits_or_loss(x, self.embed.weight, labels, self.loss)
        return self.head(x, labels, self.loss)

    def _positions(self, input_ids: Tensor, documents: Tensor | None, cache: KVCache | None) -> tuple[tuple, Mask]:
        """The RoPE tables and the attention mask of these tokens."""
        if documents is not None:
            assert cache is None, "documents are for training, a cache is for generation"
            starts = document_starts(documents)
            positions = torch.arange(documents.shape[1], device=documents.device) - starts  # (B, T), from 0 in each document
            return rope_tables(positions[:, None], self.config), self.document_mask(starts)
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        # Several queries after a cache need a shifted causal mask; SDPA's own starts at the first key.
        mask = None if past == 0 else positions[:, None] >= torch.arange(past + len(positions), device=positions.device)
        return rope_tables(positions, self.config), mask
