"""What is computed of weights, attention maps and features before it is drawn."""

from collections.abc import Sequence

import matplotlib
import torch

from .drawing import HEAT, HEAT_ALPHA, as_pixels


def patch_sequence(image: torch.Tensor, patch_hw: tuple[int, int]) -> torch.Tensor:
    """The patches in the order the model reads them, row by row: (C, H, W) -> (N, C, patch height, patch width).

    ViT, sec. 3.1: x in R^(H x W x C) becomes x_p in R^(N x P^2 C), N = HW / P^2.

    Raises:
        ValueError: The patch does not divide the image.
    """
    C, H, W = image.shape
    height, width = patch_hw
    if H % height or W % width:
        raise ValueError(f"an image of {H}x{W} cannot be cut into patches of {height}x{width}.")
    patches = image.reshape(C, H // height, height, W // width, width).permute(1, 3, 0, 2, 4)  # (h, w, C, ., .)
    return patches.reshape(-1, C, height, width)


def filter_components(
    weight: torch.Tensor, patch_hw: tuple[int, int], count: int = 28
) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal components of the patch embedding's filters (ViT, fig. 7 left).

    The D filters are points in R^(C * patch height * patch width). Their components are the right singular vectors of
    the filters less their mean; the share of the variance of component k is s_k^2 / sum_j s_j^2. The entry of largest
    magnitude is made positive.

    Args:
        weight: (D, C * patch height * patch width), as a linear layer on flattened patches has it, or the kernel
            (D, C, patch height, patch width) of a convolution.
        count: Number of components; fewer where there are fewer.

    Returns:
        Components (k, C, patch height, patch width) of unit length, and their shares (k,), largest first.
    """
    flat = weight.detach().double().flatten(1).cpu()  # (D, C * patch height * patch width)
    pixels = patch_hw[0] * patch_hw[1]
    if flat.shape[1] % pixels:
        raise ValueError(f"filters of {flat.shape[1]} numbers are not of patches of {patch_hw[0]}x{patch_hw[1]}.")
    _, s, components = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    rank = min(count, len(flat) - 1, flat.shape[1])
    components = components[:rank]
    largest = components.abs().argmax(dim=1, keepdim=True)
    components = components * components.gather(1, largest).sign()
    share = s.square()[:rank] / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
    return components.reshape(rank, -1, *patch_hw).float(), share.float()


def position_similarity(position_embeddings: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    """Cosine similarity of the patches' position embeddings (ViT, fig. 7 centre).

    Args:
        position_embeddings: (1, P, D) or (P, D), the N patches' last; what leads them (a class token's) is left out.
        grid_hw: Patches (down, across).

    Returns:
        (h, w, h, w): entry [i, j, k, l] is p_ij . p_kl / (|p_ij| |p_kl|), in [-1, 1]; 0 for a zero embedding.
    """
    h, w = grid_hw
    positions = position_embeddings.detach().float().cpu().flatten(0, -2)  # (P, D)
    if len(positions) < h * w:
        raise ValueError(f"{len(positions)} position embeddings are too few for a grid of {h}x{w} = {h * w} patches.")
    positions = torch.nn.functional.normalize(positions[len(positions) - h * w :], dim=1)
    return (positions @ positions.T).clamp(-1, 1).reshape(h, w, h, w)


def rotary_scores(rotary: torch.nn.Module, grid_hw: tuple[int, int]) -> torch.Tensor:
    """What rotary positions make of the score of a query and an equal key, by the offset between their patches.

    A pair of channels of length 1 gives cos(dy f + dx g), f and g being the angles by which it turns for one patch down
    and one across. It is taken from the turns that the model itself computes: of all patches against those in the two
    upper corners, which see each offset downwards; those upwards are the same, seen from the other patch.

    Args:
        rotary: A `ViTScratchRotaryPositions`, of which `ViTScratchModel.rotary_positions` has one, or one for a layer.
        grid_hw: Patches (down, across).

    Returns:
        (heads, d / 2, 2 h - 1, 2 w - 1) in [-1, 1]; the offset (0, 0) is in the middle. One head stands for all where
        all turn alike.
    """
    h, w = grid_hw
    with torch.no_grad():
        cos, sin = rotary(grid_hw, next(rotary.parameters(), torch.empty(0)).device).double().cpu().chunk(2, dim=-1)[1]
    turns = torch.complex(cos, sin)[..., -h * w :, :].unflatten(-2, grid_hw)  # (h, w, d / 2), or (A, h, w, d / 2)
    turns = turns if turns.ndim == 4 else turns.unsqueeze(0)
    left, right = ((turns * turns[:, :1, corner].unsqueeze(2).conj()).real for corner in (w - 1, 0))
    down = torch.cat([left, right[:, :, 1:]], dim=2)  # (A, h, 2 w - 1, d / 2)
    return torch.cat([down[:, 1:].flip(1, 2), down], dim=1).permute(0, 3, 1, 2).float()


def attention_distance(
    attentions: Sequence[torch.Tensor], grid_hw: tuple[int, int], patch_hw: tuple[int, int], num_prefix_tokens: int
) -> torch.Tensor:
    """How far each head looks, in pixels (ViT, fig. 7 right; sec. 4.5).

    The distance of two patches is that of their centres. For a query patch i it is averaged over the key patches j with
    the attention as weight, d_i = sum_j a_ij |c_i - c_j| / sum_j a_ij; d_i is averaged over queries and images. Class
    token and registers have no place, so they count neither as queries nor as keys; a query that looks at nothing else
    is left out.

    Args:
        attentions: L maps (B, A, T, T), rows are queries.
        grid_hw: Patches (down, across).
        patch_hw: Pixels (height, width) of a patch.
        num_prefix_tokens: Tokens before the first patch.

    Returns:
        (L, A) pixels; NaN for a head that no patch uses to look at a patch.
    """
    y, x = torch.meshgrid(torch.arange(grid_hw[0]), torch.arange(grid_hw[1]), indexing="ij")
    centres = torch.stack([y.flatten() * patch_hw[0], x.flatten() * patch_hw[1]], dim=1).double()  # (N, 2)
    distance = (centres[:, None] - centres[None]).norm(dim=2)  # (N, N)
    means = []
    for maps in _checked_maps(attentions, grid_hw, num_prefix_tokens):
        maps = maps[..., num_prefix_tokens:, num_prefix_tokens:].double()  # (B, A, N, N)
        mean = (maps * distance.to(maps.device)).sum(dim=3) / maps.sum(dim=3)  # (B, A, N); 0 / 0 is NaN
        means.append(mean.transpose(0, 1).flatten(1).nanmean(dim=1).cpu())
    return torch.stack(means).float()


def attention_rollout(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    """How much of each input token reaches each output token through all layers (Abnar and Zuidema, 2020).

    R = A_L ... A_2 A_1 with A_l = (mean over heads of layer l + I) / 2, where I stands for the residual connection.

    Args:
        attentions: L maps (B, A, T, T), rows are queries, first layer first.

    Returns:
        (B, T, T); row i says what output token i is made of. Rows sum to 1.
    """
    rollout = None
    for maps in _checked_maps(attentions):
        mixed = maps.float().mean(dim=1)  # (B, T, T)
        mixed = 0.5 * mixed + 0.5 * torch.eye(mixed.shape[-1], device=mixed.device)
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
        rollout = mixed if rollout is None else mixed @ rollout
    return rollout


@torch.no_grad()
def pooling_attention(vit: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Where the query of attention pooling looks: (B, T, D) -> (B, A, N), rows sum to 1.

    Args:
        vit: A `ViTScratchModel` with `pooling="attention"`.
        hidden_states: What its last block gives, before the final norm.
    """
    pooling, D = vit.attention_pooling, vit.config.hidden_size
    patches = vit.norm(hidden_states)[:, vit.config.num_prefix_tokens :]
    query = pooling.q(pooling.query).unflatten(2, (-1, pooling.head_dim))[0, 0]  # (A, d)
    key = pooling.kv(patches)[..., :D].unflatten(2, (-1, pooling.head_dim))  # (B, N, D) -> (B, N, A, d)
    return (torch.einsum("ad,bnad->ban", query, key).float() * pooling.head_dim**-0.5).softmax(dim=-1)


def attention_on_grid(
    maps: torch.Tensor,
    grid_hw: tuple[int, int],
    num_prefix_tokens: int,
    pooling: str = "cls",
    num_cls_tokens: int = 1,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the classifier looks at: the share of each patch, relative to an even share.

    Of maps over tokens, such as a head's attention or a rollout, take the rows of what the classifier sees, keep the
    patches' columns, and scale them to mean 1. It sees the class tokens ("cls"), the mean of the patches ("mean"), both
    ("cls+mean"), or a mean of the patches with weights of its own ("attention"). Where it sees several, one after the
    other, each counts alike.

    Args:
        maps: (..., T, T), rows are queries; (B, ..., T, T) for "attention".
        grid_hw: Patches (down, across).
        num_prefix_tokens: Tokens before the first patch.
        pooling: The config's.
        num_cls_tokens: Class tokens.
        weights: (B, N) for "attention": the mean over heads of `pooling_attention`.

    Returns:
        (..., h, w); 1 is what attention spread evenly over the patches gives.
    """
    (maps,) = _checked_maps([maps], grid_hw, num_prefix_tokens)
    if pooling.startswith("cls") and num_prefix_tokens < num_cls_tokens:
        raise ValueError(
            f"pooling {pooling!r} needs {num_cls_tokens} class tokens, but num_prefix_tokens is {num_prefix_tokens}; "
            "use 'mean'."
        )
    of_patches = maps[..., num_prefix_tokens:, :]  # (..., N, T)
    if pooling == "attention":
        if weights is None:
            raise ValueError("pooling 'attention' needs weights: the mean over heads of pooling_attention.")
        weights = weights.to(maps).reshape(len(maps), *[1] * (maps.ndim - 3), -1, 1)  # (B, ..., N, 1)
        rows = (weights * of_patches).sum(dim=-2)  # (..., T)
    else:
        seen = [maps[..., :num_cls_tokens, :]] if pooling.startswith("cls") else []
        seen += [of_patches.mean(dim=-2, keepdim=True)] if pooling.endswith("mean") else []
        rows = torch.cat(seen, dim=-2).mean(dim=-2)  # (..., T)
    patches = rows[..., num_prefix_tokens:].float()  # (..., N)
    patches = patches / patches.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return patches.unflatten(-1, grid_hw)


def overlay_pixels(image: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """A map over an image in grey, as `plot_attention_rollout` draws it, without a figure around it.

    Args:
        image: (C, H, W), uint8, or floating point in [0, 1].
        heat: (h, w), at least 0; dark is 0, bright the largest value.

    Returns:
        uint8 (H, W, 3).
    """
    grey = as_pixels(image).mean(dim=0)  # (H, W)
    heat = heat.detach().float().cpu() / heat.max().clamp_min(torch.finfo(torch.float32).tiny)
    large = torch.nn.functional.interpolate(heat[None, None], size=grey.shape, mode="nearest-exact")[0, 0]
    colours = torch.from_numpy(matplotlib.colormaps[HEAT](large.numpy())[..., :3])  # (H, W, 3)
    return (255 * (HEAT_ALPHA * colours + (1 - HEAT_ALPHA) * grey[..., None])).round().to(torch.uint8)


def patch_mosaic(image: torch.Tensor, patch_hw: tuple[int, int], enlarge: int = 1, gap: int = 1) -> torch.Tensor:
    """The patches in their places with white gaps between: uint8 (C, H, W) -> (C, H', W').

    Args:
        image: As the model gets it.
        patch_hw: Pixels (height, width) of a patch.
        enlarge: Each pixel becomes a square of so many.
        gap: Pixels between patches.
    """
    patches = patch_sequence(image, patch_hw).repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    patches = torch.nn.functional.pad(patches, (0, gap, 0, gap), value=255)  # (N, C, height + gap, width + gap)
    grid = patches.unflatten(0, (-1, image.shape[2] // patch_hw[1])).permute(2, 0, 3, 1, 4)  # (C, h, ., w, .)
    return grid.flatten(3, 4).flatten(1, 2)[:, :-gap, :-gap]


def project_features(features: torch.Tensor, method: str = "pca", seed: int = 0) -> tuple[torch.Tensor, list[float]]:
    """Features in the plane: (n, D) -> (n, 2).

    Args:
        method: "pca", the two directions of most variance, or "tsne" (van der Maaten and Hinton, 2008), perplexity 30
            or a third of the images, started from the components.
        seed: Of t-SNE.

    Returns:
        The points, and each axis' share of the variance (none for t-SNE).
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    features = torch.as_tensor(features).detach().float().cpu().numpy()
    n = len(features)
    if n < 4 or features.ndim != 2:
        raise ValueError(f"features must be (n, D) of at least 4 images, got shape {features.shape}.")
    if method == "pca":
        components = PCA(2, random_state=0).fit(features)
        return torch.from_numpy(components.transform(features)), components.explained_variance_ratio_.tolist()
    if method != "tsne":
        raise ValueError(f"method ({method!r}) must be 'pca' or 'tsne'.")
    points = TSNE(2, perplexity=min(30.0, (n - 1) / 3), init="pca", random_state=seed).fit_transform(features)
    return torch.from_numpy(points), []


def _checked_maps(attentions: Sequence[torch.Tensor], grid_hw: tuple[int, int] | None = None, prefix: int = 0):
    """The maps, if they are maps over the tokens that the grid and the prefix make."""
    if len(attentions) == 0 or any(maps is None for maps in attentions):
        raise ValueError("attention maps are missing; call the model with output_attentions=True.")
    tokens = attentions[0].shape[-1]
    expected = tokens if grid_hw is None else prefix + grid_hw[0] * grid_hw[1]
    for maps in attentions:
        if tuple(maps.shape[-2:]) != (expected, expected):
            made = "" if grid_hw is None else f" ({prefix} + {grid_hw[0]}x{grid_hw[1]} patches)"
            raise ValueError(f"maps of shape {tuple(maps.shape)} are not over {expected} tokens{made}.")
    return attentions
