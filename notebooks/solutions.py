"""Solutions of the exercises in vit_from_scratch.ipynb; try first."""

import torch
from torch.nn import functional as F


def patchify_without_loops(images, patch):
    """Patches, row by row: (B, C, H, W) -> (B, N, C P P)."""
    B, C, H, W = images.shape
    squares = images.reshape(B, C, H // patch, patch, W // patch, patch)  # (B, C, h, P, w, P)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)  # (B, h, w, C, P, P) -> (B, N, C P P)


def unpatchify(patches, patch, image_hw):
    """The image of which these are the patches: (B, N, C P P) -> (B, C, H, W)."""
    (B, _, size), (H, W) = patches.shape, image_hw
    squares = patches.reshape(B, H // patch, W // patch, size // patch**2, patch, patch)  # (B, h, w, C, P, P)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(B, -1, H, W)  # (B, C, h, P, w, P) -> (B, C, H, W)


def kernel_of_projection(weight, patch):
    """The kernel with which a convolution of stride P projects as a linear layer does: (D, C P P) -> (D, C, P, P)."""
    return weight.reshape(len(weight), -1, patch, patch)


def add_class_token_and_positions(patches, cls_token, positions):
    """Equation 1 without E: (B, N, D), (1, 1, D) and (1, 1 + N, D) -> (B, 1 + N, D)."""
    return torch.cat([cls_token.expand(len(patches), -1, -1), patches], dim=1) + positions


def attention_of_one_head(query, key, value):
    """Equations 6 and 7: (B, T, d) each -> (B, T, d)."""
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5  # (B, T, T)
    return scores.softmax(dim=-1) @ value


def multi_head_attention(z, qkv_weight, qkv_bias, proj_weight, proj_bias, heads):
    """Equation 8, all heads at once: (B, T, D) -> (B, T, D)."""
    B, T, D = z.shape
    qkv = F.linear(z, qkv_weight, qkv_bias)  # (B, T, 3 D)
    query, key, value = qkv.reshape(B, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)  # (B, A, T, d) each
    maps = (query @ key.transpose(2, 3) * (D // heads) ** -0.5).softmax(dim=-1)  # (B, A, T, T)
    return F.linear((maps @ value).transpose(1, 2).reshape(B, T, D), proj_weight, proj_bias)


def resize_for_larger_image(positions, old_hw, new_hw):
    """Section 3.2, bicubic: (1, 1 + N, D) -> (1, 1 + N', D)."""
    cls, patches = positions[:, :1], positions[:, 1:]
    grid = patches.reshape(1, *old_hw, -1).permute(0, 3, 1, 2)  # (1, N, D) -> (1, h, w, D) -> (1, D, h, w)
    grid = F.interpolate(grid, size=new_hw, mode="bicubic")
    return torch.cat([cls, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def rollout(maps):
    """What each output token is made of (Abnar and Zuidema, 2020): (L, B, A, T, T) -> (B, T, T)."""
    identity = torch.eye(maps.shape[-1])
    result = identity.expand(maps.shape[1], -1, -1)
    for layer in maps.mean(dim=2):  # (B, T, T), the first layer first
        result = (layer + identity) / 2 @ result
    return result
