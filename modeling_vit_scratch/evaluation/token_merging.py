"""Token merging (Bolya et al., 2023, "Token Merging: Your ViT But Faster"): fewer tokens block by block, untrained.

`merge_tokens(model, r)` has each block merge r patch tokens into others like them, between attention and MLP, so that
later blocks have less to do; the weights stay as they are. Letters in shape comments are those of
`modeling_vit_scratch`; T' are the tokens left, and n the patch tokens among them.

Blocks hand each other all T tokens, each with what its group has become, so that whatever reads them (pooling by the
mean or by attention, the final norm, hidden states, a backbone's maps) goes on as it did, and weights a group by its
size. What the blocks compute, they compute on T' tokens, which travel beside, in a `MergedTokens` for each forward
pass.

Where this leaves the paper's code: class tokens and registers take no part in the matching at all, and so do not count
when tokens are dealt out in turn; and rotary positions, which the paper has not, are averaged over a group.
"""

import functools
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..modeling_vit_scratch import eager_attention_forward, rotate

# Those that take numbers to be added to the scores, one for each key.
IMPLEMENTATIONS = ("eager", "sdpa")


def merge_tokens(model: nn.Module, r: int):
    """Have each block of a model merge r patch tokens, from its next call on; 0 undoes it.

        merge_tokens(model, 16)

    Changes how the model computes, in place, and no weight. A block never merges more than half of the patch tokens
    that it has; class tokens and registers stay. Attention maps and hidden states are of all tokens still: patches of
    one group have the same state and the same row, and share alike what is attended of them.

    Args:
        model: Ours, in evaluation mode when it is called; or one that has ours inside, as a backbone.
        r: Tokens a block, from 0 to half of the patches at the config's `image_size`.

    Raises:
        ValueError: r is out of range, or there is no encoder of ours; and, when the model is called, it is in training
            mode, is given a mask, or attends by an implementation that `IMPLEMENTATIONS` does not name.
    """
    encoders = [module for module in model.modules() if _is_encoder(module)]
    if not encoders:
        raise ValueError(f"{type(model).__name__} has no encoder of this package; convert_checkpoint makes one.")
    for encoder in encoders:
        h, w = encoder.config.grid_hw
        if not isinstance(r, Integral) or isinstance(r, bool) or not 0 <= r <= h * w // 2:
            raise ValueError(
                f"token_merging ({r}) must be a whole number from 0 to {h * w // 2}, half of the {h * w} patches."
            )
    for encoder in encoders:
        encoder.token_merging = int(r)
        _switch(encoder, _MergingEncoder, r > 0)
        for layer in encoder.layers:
            _switch(layer, _MergingLayer, r > 0)
            _switch(layer.attention, _MergingAttention, r > 0)


def _is_encoder(module: nn.Module) -> bool:
    """Ours, or a copy of it that transformers loaded from a model's own folder."""
    return getattr(getattr(module, "config", None), "model_type", None) == "vit_scratch" and hasattr(module, "layers")


def _switch(module: nn.Module, way: type, on: bool):
    """Give a module its class with that way of computing, or its own back."""
    if on != isinstance(module, way):
        module.__class__ = _with_way(type(module), way) if on else type(module).__bases__[1]


@functools.cache
def _with_way(own: type, way: type) -> type:
    """A subclass of the module's own class, of the same name, by which folders and libraries know it."""
    return type(own.__name__, (way, own), {"__module__": own.__module__, "__doc__": own.__doc__})


def match_tokens(keys: torch.Tensor, r: int) -> torch.Tensor:
    """Bipartite soft matching: where each of n tokens goes if r are merged. ToMe, sec. 3.

    Tokens are dealt out in turn to two sides, the first to the one that receives. Each of the other side has a partner,
    the most similar of the receiving side (by the cosine of their keys); the r most similar pairs are merged.

    Args:
        keys: Keys of patch tokens (B, n, d), the mean over heads.
        r: In [0, n / 2].

    Returns:
        (B, n), for each token the number, from 0 to n - r - 1, of the one that it becomes or joins: first those of the
        giving side that are left, then the receiving side, each in order.
    """
    n, left = keys.shape[1], keys.shape[1] // 2 - r
    keys = nn.functional.normalize(keys.float(), dim=-1)
    receiving, giving = keys[:, 0::2], keys[:, 1::2]  # (B, n - n // 2, d) and (B, n // 2, d)
    similarity, partner = (giving @ receiving.transpose(1, 2)).max(dim=-1)  # (B, n // 2) each
    merged = torch.zeros_like(partner, dtype=torch.bool).scatter(1, similarity.topk(r, dim=-1).indices, True)
    given = torch.where(merged, left + partner, (~merged).cumsum(dim=-1) - 1)  # (B, n // 2)
    received = torch.arange(left, n - r, device=keys.device).expand(keys.shape[0], -1)  # (B, n - n // 2)
    given = nn.functional.pad(given, (0, n % 2))
    return torch.stack([received, given], dim=-1).flatten(1)[:, :n]


def _numbers(index: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers (B, T) of rows among `count`, as numbers of the rows of all images, one after the other: (B T,)."""
    return (index + count * torch.arange(index.shape[0], device=index.device).unsqueeze(1)).flatten()


def _take(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of each image, the tokens of these numbers: (B, T', D) and (B, T) -> (B, T, D)."""
    # Whole rows, which is many times faster on a CPU than gather, that takes each number by itself.
    return tokens.flatten(0, 1).index_select(0, _numbers(index, tokens.shape[1])).unflatten(0, index.shape)


def _sums(tokens: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """Of each image, the sums of the tokens that go to one number: (B, T, D) and (B, T) -> (B, `count`, D)."""
    rows = tokens.flatten(0, 1)
    where = _numbers(index, count).unsqueeze(1).expand_as(rows)
    sums = rows.new_zeros(tokens.shape[0] * count, rows.shape[1]).scatter_add(0, where, rows)
    return sums.unflatten(0, (tokens.shape[0], count))


@dataclass
class MergedTokens:
    """The tokens of one forward pass, and of which of the first T each is made; None before any are merged.

    Args:
        r: Tokens that a block merges.
        prefix: Class tokens and registers.
        tokens: (B, T', D).
        sizes: Of how many tokens each is the mean, float32 (B, T').
        source: The number, among the T', of each of the T tokens: (B, T).
    """

    r: int
    prefix: int
    tokens: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    source: torch.Tensor | None = None

    def merge(self, tokens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Merge r patch tokens: (B, T', D) -> (B, T' - r, D), each the mean of what it is made of, by size.

        Args:
            keys: The mean over heads, (B, T', d).
        """
        B, T = tokens.shape[:2]
        r = min(self.r, (T - self.prefix) // 2)
        if r == 0:
            return tokens
        prefix = torch.arange(self.prefix, device=tokens.device).expand(B, -1)
        target = torch.cat([prefix, self.prefix + match_tokens(keys[:, self.prefix :], r)], dim=1)  # (B, T')
        before = torch.ones_like(target, dtype=torch.float32) if self.sizes is None else self.sizes
        self.sizes = _sums(before.unsqueeze(2), target, T - r).squeeze(2)
        self.source = target if self.source is None else target.gather(1, self.source)
        weights = before / self.sizes.gather(1, target)  # 1 of a token that is not merged: it stays as it is
        return _sums(tokens.float() * weights.unsqueeze(2), target, T - r).to(tokens.dtype)

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """To each token what its group is: (B, T', D) -> (B, T, D)."""
        return tokens if self.source is None else _take(tokens, self.source)

    def spread_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """Attention over groups as attention over tokens, rows of which sum to 1: (B, A, T', T') -> (B, A, T, T)."""
        if self.source is None:
            return maps
        maps = (maps / self.sizes[:, None, None]).to(maps.dtype)
        rows = self.source[:, None, :, None].expand(-1, maps.shape[1], -1, maps.shape[3])
        columns = self.source[:, None, None].expand(-1, maps.shape[1], self.source.shape[1], -1)
        return maps.gather(2, rows).gather(3, columns)

    def mean(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean of all patches: (B, T', D) -> (B, 1, D)."""
        patches = tokens[:, self.prefix :]
        if self.sizes is None:
            return patches.mean(dim=1, keepdim=True)
        sizes = self.sizes[:, self.prefix :, None]
        return ((patches.float() * sizes).sum(dim=1, keepdim=True) / sizes.sum(dim=1, keepdim=True)).to(tokens.dtype)

    def rotations(self, rotation: torch.Tensor) -> torch.Tensor:
        """Rotary positions of groups: (2, T, d) or (2, A, T, d) -> (2, B, 1, T', d) or (2, B, A, T', d).

        A group's cosines and sines are the means of its tokens'. A score is linear in them: a query then gives a group
        of equal keys the mean of the scores that it gives them one by one, each at its own place. A single place, such
        as the mean one, would give it the score of a token that may not be in the group.
        """
        if self.source is None:
            return rotation
        rotation = rotation if rotation.ndim == 4 else rotation.unsqueeze(1)  # (2, A, T, d), or 1 in place of A
        each = rotation.permute(2, 0, 1, 3)  # (T, 2, A, d)
        weights = 1 / self.sizes.gather(1, self.source)  # (B, T)
        sums = _sums(each.flatten(1) * weights.unsqueeze(2), self.source, self.sizes.shape[1])  # (B, T', 2 A d)
        return sums.unflatten(2, each.shape[1:]).permute(2, 0, 3, 1, 4)


class _MergingEncoder:
    """The encoder, with a `MergedTokens` for each forward pass."""

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos=None, *args, attention_mask=None, **kwargs):
        mend, how = "; merge_tokens(model, 0) switches it off.", self.config._attn_implementation
        if self.training:
            raise ValueError(f"token merging is of inference, but the model is in training mode: model.eval(){mend}")
        if attention_mask is not None or bool_masked_pos is not None:
            name = "attention_mask" if bool_masked_pos is None else "bool_masked_pos"
            raise ValueError(f"token merging takes no {name}: the tokens that it names are merged with others{mend}")
        if how not in IMPLEMENTATIONS:
            raise ValueError(
                f"token merging needs attention by {' or '.join(IMPLEMENTATIONS)}, which add the sizes of tokens to "
                f"the scores, and not by {how}: model.set_attn_implementation('sdpa'){mend}"
            )
        merging = MergedTokens(self.token_merging, self.config.num_prefix_tokens)
        return super().forward(pixel_values, None, *args, merging=merging, **kwargs)


class _MergingLayer:
    """The block, on the tokens that are left; gives all tokens, each what its group is: (B, T, D) -> (B, T, D).

    The last block of a classifier that reads class tokens merges nothing: after attention nobody looks at a patch. One
    that reads the mean does, since every patch goes through the first layer of the MLP; the mean is taken before the
    second, as in `last_block`.
    """

    def forward(self, hidden_states, output_attentions=False, pool=None, merging=None, rotation=None, **kwargs):
        if merging is None:  # the block alone
            return super().forward(hidden_states, output_attentions, pool, rotation=rotation, **kwargs)
        z = hidden_states if merging.tokens is None else merging.tokens  # (B, T', D)
        kwargs |= {"sizes": merging.sizes, "rotation": None if rotation is None else merging.rotations(rotation)}
        if pool is not None and self.attention.config.pooling == "cls":
            return self.last_block(z, pool, **kwargs)
        keys, maps = [], []
        keep = {"keep_keys": keys.append, "keep_maps": maps.append if output_attentions else None}
        z = self.layer_scale1(self.attention(self.norm1(z), **keep, **kwargs)) + z
        maps = [merging.spread_maps(attended) for attended in maps]
        z = merging.merge(z, *keys)
        if pool is not None:
            inner = self.mlp.fc2(merging.mean(self.mlp.hidden(self.norm2(z))))
            return self.layer_scale2(inner) + merging.mean(z)
        merging.tokens = self.layer_scale2(self.mlp(self.norm2(z))) + z
        hidden_states = merging.spread(merging.tokens)
        return (hidden_states, *maps) if output_attentions else hidden_states


class _MergingAttention:
    """The attention, with a token's size in the scores of its key, so that it counts for as many as it is made of.

    ToMe, sec. 3, "proportional attention": softmax(q k^T / sqrt(d) + log s).
    """

    def forward(
        self, hidden_states, sizes=None, keep_keys=None, keep_maps=None, num_queries=None, rotation=None, **kwargs
    ):
        """`keep_keys` is called with the mean over heads of the keys (B, T', d), before they are rotated."""
        qkv = self.qkv(hidden_states)  # (B, T', D) -> (B, T', 3 D)
        if self.q_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)
        parts = qkv.chunk(3, dim=2)  # (B, T', D) each
        query, key, value = (x.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for x in parts)  # (B, A, T', d) each
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        if keep_keys is not None:
            keep_keys(key.mean(dim=1))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        implementation = self.config._attn_implementation if keep_maps is None else "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        mask = None if sizes is None else sizes.log()[:, None, None].to(query.dtype)  # (B, 1, 1, T')
        kwargs = {"scaling": self.scaling, **kwargs, "attention_mask": mask}
        context, maps = attend(self, query[:, :, :num_queries], key, value, **kwargs)
        if keep_maps is not None:
            keep_maps(maps)
        return self.proj(context.flatten(2))  # (B, A, T', d) -> (B, T', D)
