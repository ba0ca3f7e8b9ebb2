"""Checks of the exercises in vit_from_scratch.ipynb: what you wrote against what the package computes.

    from checks import check
    check(multi_head_attention)

The name of the function says which exercise it answers. Each is called with random tensors of several shapes, and what
it gives is compared with what the package's own code makes of the same tensors. Where they differ, the check says how:
the shape, or the value and where it stands, and a hint if the answer is one of the mistakes that people make here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from modeling_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.modeling_vit_scratch import (
    ViTScratchAttention,
    ViTScratchEmbeddings,
    ViTScratchPatchEmbeddings,
    eager_attention_forward,
    resize_positions,
)
from modeling_vit_scratch.plots import attention_rollout

TOLERANCE = 1e-5  # what float32 may lose; the largest numbers compared are of the order of 1


@dataclass
class Exercise:
    """One exercise.

    Args:
        number: Its number in the notebook.
        cases: Gives the arguments of each call, as dictionaries.
        package: Computes the right answer from such arguments, by the package's own code.
        mistakes: Hint -> the mistaken computation that it is for.
        finish: What is compared, from an answer and the arguments: the answer itself, unless several would be right.
    """

    number: int
    cases: Callable[[], list[dict]]
    package: Callable[..., torch.Tensor]
    mistakes: dict[str, Callable[..., torch.Tensor]]
    finish: Callable[..., torch.Tensor] = lambda answer, **arguments: answer


def check(answer: Callable) -> bool:
    """Print whether a function solves the exercise of its name and, if not, what differs; True where it does.

    Raises:
        ValueError: No exercise has the function's name.
    """
    name = answer.__name__
    if name not in EXERCISES:
        raise ValueError(f"no exercise is called {name!r}; there are {', '.join(EXERCISES)}.")
    exercise = EXERCISES[name]
    with torch.random.fork_rng():
        torch.manual_seed(exercise.number)
        cases = exercise.cases()
    for arguments in cases:
        complaint = _complaint(exercise, answer, arguments)
        if complaint:
            print(f"Exercise {exercise.number}, {name}: {complaint}")
            return False
    print(f"Exercise {exercise.number}, {name}: right, in {len(cases)} cases out of {len(cases)}.")
    return True


@torch.no_grad()
def _complaint(exercise: Exercise, answer: Callable, arguments: dict) -> str | None:
    """What is wrong with an answer to one case, or None."""
    given = ", ".join(f"{name} {_described(value)}" for name, value in arguments.items())
    mine = {name: value.clone() if torch.is_tensor(value) else value for name, value in arguments.items()}
    try:
        result = answer(**mine)
    except NotImplementedError:
        return "yours to write."
    except Exception as error:
        return f"it stops with {type(error).__name__} ({error}) for {given}."
    if not torch.is_tensor(result) or result.dtype != torch.float32:
        return f"it gives {_described(result)}, where a tensor of float32 is wanted."
    changed = [name for name, value in arguments.items() if torch.is_tensor(value) and not value.equal(mine[name])]
    if changed:
        return f"it writes into its argument {changed[0]}; make a new tensor instead."
    try:
        result = exercise.finish(result, **arguments)
    except ValueError as error:
        return f"{error}\n  for {given}."
    difference = _difference(result, exercise.package(**arguments))
    if difference is None:
        return None
    for hint, mistaken in exercise.mistakes.items():
        if _difference(result, exercise.finish(mistaken(**arguments), **arguments)) is None:
            return f"{difference}\n  for {given}.\n  Hint: {hint}"
    return f"{difference}\n  for {given}."


def _difference(result: torch.Tensor, right: torch.Tensor) -> str | None:
    """How two tensors differ, or None."""
    if result.shape != right.shape:
        return f"the shape is {tuple(result.shape)}, and should be {tuple(right.shape)}"
    wrong = ~torch.isclose(result, right, rtol=TOLERANCE, atol=TOLERANCE)
    if not wrong.any():
        return None
    where = tuple(wrong.nonzero()[0].tolist())
    return (
        f"the shape is right, but {int(wrong.sum()):,} of {wrong.numel():,} values differ; the first is at "
        f"{list(where)}: {result[where]:.4f}, and should be {right[where]:.4f}"
    )


def _described(value) -> str:
    return f"{tuple(value.shape)}" if torch.is_tensor(value) else repr(value)


# 1. Patches.


def _tokens(images: torch.Tensor, patch: int, weight: torch.Tensor) -> torch.Tensor:
    """The package's patch embedding with this projection (D, C P P): (B, C, H, W) -> (B, N, D)."""
    (_, C, H, W), D = images.shape, len(weight)
    config = ViTScratchConfig(image_size=(H, W), patch_size=patch, num_channels=C, hidden_size=D, num_attention_heads=1)
    module = ViTScratchPatchEmbeddings(config)
    module.projection.weight.data, module.projection.bias.data = weight, torch.zeros(D)
    return module(images)


def _patches(images: torch.Tensor, patch: int) -> torch.Tensor:
    """The same with a projection that changes nothing: (B, C, H, W) -> (B, N, C P P)."""
    return _tokens(images, patch, torch.eye(images.shape[1] * patch * patch))


def _image_cases() -> list[dict]:
    return [
        {"images": torch.randn(2, 3, 8, 8), "patch": 4},
        {"images": torch.randn(2, 3, 8, 12), "patch": 2},  # 4 patches down, 6 across
    ]


def _squares(images: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, h, P, w, P)."""
    return images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))


def _merged(squares: torch.Tensor) -> torch.Tensor:
    """(B, h, w, ., ., .) -> (B, N, C P P)."""
    return squares.flatten(3).flatten(1, 2)


PATCHIFY_MISTAKES = {
    "a reshape alone cuts the rows of pixels into pieces, not the image into squares: split H into (h, P) and W into "
    "(w, P), then permute.": lambda images, patch: images.reshape(len(images), -1, images.shape[1] * patch * patch),
    "split H into (h, P) and W into (w, P), in this order: a row of pixels belongs to the patch row that it is in.": (
        lambda images, patch: _merged(
            images.unflatten(3, (patch, -1)).unflatten(2, (patch, -1)).permute(0, 3, 5, 1, 2, 4)
        )
    ),
    "h and w have to come before C: a patch holds all its channels.": lambda images, patch: (
        _squares(images, patch).permute(0, 1, 2, 4, 3, 5).reshape(len(images), -1, images.shape[1] * patch * patch)
    ),
    "F.unfold gives (B, C P P, N); the patches come before their numbers.": lambda images, patch: F.unfold(
        images, patch, stride=patch
    ),
    "the patches run down the columns; in the paper they are read as words are, row by row.": lambda images, patch: (
        _merged(_squares(images, patch).permute(0, 4, 2, 1, 3, 5))
    ),
    "each patch is transposed: inside it, x comes before y.": lambda images, patch: _merged(
        _squares(images, patch).permute(0, 2, 4, 1, 5, 3)
    ),
    "inside a patch the channels come last; a convolution's kernel, and this package, have them first.": (
        lambda images, patch: _merged(_squares(images, patch).permute(0, 2, 4, 3, 5, 1))
    ),
}

# 2. And back.


def _unpatchify_cases() -> list[dict]:
    return [
        {"patches": _patches(**case), "patch": case["patch"], "image_hw": tuple(case["images"].shape[2:])}
        for case in _image_cases()
    ]


def _image(patches: torch.Tensor, patch: int, image_hw: tuple[int, int]) -> torch.Tensor:
    """The image whose patches, as the package cuts them, these are: each pixel is looked up by its number."""
    (H, W), (B, _, size) = image_hw, patches.shape
    C = size // patch**2
    numbers = torch.arange(C * H * W, dtype=torch.float32).view(1, C, H, W)
    order = _patches(numbers, patch).flatten().long()  # which pixel each number of the patches is
    return torch.empty(B, C * H * W).index_copy(1, order, patches.flatten(1)).view(B, C, H, W)


def _wrong_image(order: tuple[int, ...], inside: Callable = lambda P: (-1, P, P), columns: bool = False) -> Callable:
    """Patches laid down with one thing changed.

    Args:
        order: Of the axes (B, h, w and those of `inside`) before the last reshape.
        inside: P -> how a patch is split, rightly into (C, P, P).
        columns: Whether N is split into (w, h).
    """

    def lay(patches: torch.Tensor, patch: int, image_hw: tuple[int, int]) -> torch.Tensor:
        grid = [side // patch for side in (reversed(image_hw) if columns else image_hw)]
        squares = patches.unflatten(2, inside(patch)).unflatten(1, grid)
        return squares.permute(order).reshape(len(patches), -1, *image_hw)

    return lay


UNPATCHIFY_MISTAKES = {
    "a reshape alone lays the patches on one another's rows: go to (B, h, w, C, P, P) first, then permute.": (
        lambda patches, patch, image_hw: patches.reshape(len(patches), -1, *image_hw)
    ),
    "before the last reshape the order has to be (B, C, h, P, w, P): each h stands beside its P.": _wrong_image(
        (0, 3, 1, 2, 4, 5)
    ),
    "inside a patch the channels come first.": _wrong_image((0, 5, 1, 3, 2, 4), inside=lambda P: (P, P, -1)),
    "each patch is transposed: its rows are its columns.": _wrong_image((0, 3, 1, 5, 2, 4)),
    "the patches are laid down the columns; they were read row by row.": _wrong_image((0, 3, 2, 4, 1, 5), columns=True),
}

# 3. The projection as a convolution.


def _kernel_cases() -> list[dict]:
    return [
        {"weight": torch.randn(5, 3 * 4 * 4) / 7, "patch": 4},
        {"weight": torch.randn(6, 2 * 2) / 2, "patch": 2},
    ]


def _pixels(weight: torch.Tensor, patch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, weight.shape[1] // patch**2, 2 * patch, 3 * patch, generator=generator)


def _projected(weight: torch.Tensor, patch: int) -> torch.Tensor:
    """The package's tokens of an image, with this projection: (2, 6, D)."""
    return _tokens(_pixels(weight, patch), patch, weight)


def _convolved(answer: torch.Tensor, weight: torch.Tensor, patch: int) -> torch.Tensor:
    """Tokens of the same image by a convolution with the kernel (D, C, P, P)."""
    shape = len(weight), weight.shape[1] // patch**2, patch, patch
    if answer.shape != shape:
        raise ValueError(f"the shape is {tuple(answer.shape)}, and should be {shape}")
    return F.conv2d(_pixels(weight, patch), answer, stride=patch).flatten(2).transpose(1, 2)


KERNEL_MISTAKES = {
    "the kernel is transposed: a row of the weight runs over channels, then y, then x.": lambda weight, patch: (
        weight.unflatten(1, (-1, patch, patch)).transpose(2, 3)
    ),
    "a row of the weight has the channels first, not last.": lambda weight, patch: weight.unflatten(
        1, (patch, patch, -1)
    ).permute(0, 3, 1, 2),
}

# 4. Class token and positions.


def _token_cases() -> list[dict]:
    return [
        {"patches": torch.randn(2, 6, 8), "cls_token": torch.randn(1, 1, 8), "positions": torch.randn(1, 7, 8)},
        {"patches": torch.randn(3, 4, 6), "cls_token": torch.randn(1, 1, 6), "positions": torch.randn(1, 5, 6)},
    ]


def _embedded(patches: torch.Tensor, cls_token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The package's embeddings of an image whose patches are these: one pixel for each patch, D channels."""
    _, N, D = patches.shape
    config = ViTScratchConfig(image_size=(1, N), patch_size=1, num_channels=D, hidden_size=D, num_attention_heads=1)
    module = ViTScratchEmbeddings(config).eval()
    module.patch_embeddings.projection.weight.data = torch.eye(D)
    module.patch_embeddings.projection.bias.data = torch.zeros(D)
    module.cls_token.data, module.position_embeddings.data = cls_token, positions
    return module(patches.transpose(1, 2).unsqueeze(2), None, False)


TOKEN_MISTAKES = {
    "the class token comes first, before the patches.": lambda patches, cls_token, positions: (
        torch.cat([patches, cls_token.expand(len(patches), -1, -1)], dim=1) + positions
    ),
    "the class token has a position too, the first.": lambda patches, cls_token, positions: torch.cat(
        [cls_token.expand(len(patches), -1, -1), patches + positions[:, 1:]], dim=1
    ),
    "the patches have the positions after the first, which is the class token's.": (
        lambda patches, cls_token, positions: torch.cat(
            [cls_token.expand(len(patches), -1, -1) + positions[:, -1:], patches + positions[:, :-1]], dim=1
        )
    ),
    "the positions are missing: they are added to all tokens.": lambda patches, cls_token, positions: torch.cat(
        [cls_token.expand(len(patches), -1, -1), patches], dim=1
    ),
}

# 5. The attention of one head.


def _head_cases() -> list[dict]:
    return [
        {"query": torch.randn(2, 5, 8), "key": torch.randn(2, 5, 8), "value": torch.randn(2, 5, 8)},
        {"query": torch.randn(1, 3, 4), "key": torch.randn(1, 3, 4), "value": torch.randn(1, 3, 4)},
    ]


def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    heads = (tokens.unsqueeze(1) for tokens in (query, key, value))  # (B, 1, T, d) each
    context, _ = eager_attention_forward(torch.nn.Identity(), *heads, None, query.shape[-1] ** -0.5)
    return context.squeeze(2)  # (B, T, 1, d) -> (B, T, d)


def _wrong_head(scale: Callable[[int], float], axis: int = -1, softmax: bool = True) -> Callable:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = query @ key.transpose(1, 2) * scale(query.shape[-1])
        return (scores.softmax(axis) if softmax else scores) @ value

    return attend


HEAD_MISTAKES = {
    "the softmax runs over the wrong axis: for each query, the weights of all keys sum to 1.": _wrong_head(
        lambda d: d**-0.5, axis=-2
    ),
    "the scores are not scaled: divide them by the square root of d before the softmax.": _wrong_head(lambda d: 1),
    "the scores are divided by d; the paper divides by its square root.": _wrong_head(lambda d: 1 / d),
    "the scores are multiplied by the square root of d; divide.": _wrong_head(lambda d: d**0.5),
    "the softmax runs over the batch: for each query, the weights of all keys sum to 1.": _wrong_head(
        lambda d: d**-0.5, axis=0
    ),
    "the scale comes before the softmax, not after it.": lambda query, key, value: (
        (query @ key.transpose(1, 2)).softmax(-1) * query.shape[-1] ** -0.5 @ value
    ),
    "the softmax is missing.": _wrong_head(lambda d: d**-0.5, softmax=False),
    "queries and keys have changed places.": lambda query, key, value: _attended(key, query, value),
}

# 6. All heads with one matrix product.


def _attention_cases() -> list[dict]:
    cases = []
    for B, T, D, heads in ((2, 5, 12, 3), (1, 4, 8, 2)):
        shapes = {"z": (B, T, D), "qkv_weight": (3 * D, D), "qkv_bias": (3 * D,), "proj_weight": (D, D)}
        tensors = {name: torch.randn(shape) * (D**-0.5 if "weight" in name else 1) for name, shape in shapes.items()}
        cases.append(tensors | {"proj_bias": torch.randn(D), "heads": heads})
    return cases


def _package_attention(z, qkv_weight, qkv_bias, proj_weight, proj_bias, heads: int) -> torch.Tensor:
    config = ViTScratchConfig(hidden_size=z.shape[-1], num_attention_heads=heads, attn_implementation="eager")
    module = ViTScratchAttention(config).eval()
    module.qkv.weight.data, module.qkv.bias.data = qkv_weight, qkv_bias
    module.proj.weight.data, module.proj.bias.data = proj_weight, proj_bias
    return module(z)


def _wrong_attention(
    split: Callable | None = None, join: Callable | None = None, scale: Callable | None = None, axis: int = -1
) -> Callable:
    """Multi-head attention with one thing changed.

    Args:
        split: (B, T, 3 D) and the heads -> queries, keys and values (B, A, T, d).
        join: (B, A, T, d) -> (B, T, D).
        scale: D and the heads -> the factor of the scores.
        axis: Of the softmax.
    """

    def attend(z, qkv_weight, qkv_bias, proj_weight, proj_bias, heads: int) -> torch.Tensor:
        D = z.shape[-1]
        qkv = F.linear(z, qkv_weight, qkv_bias)
        if split is not None:
            query, key, value = split(qkv, heads)
        else:
            query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
        factor = scale(D, heads) if scale else (D // heads) ** -0.5
        context = (query @ key.transpose(2, 3) * factor).softmax(axis) @ value
        tokens = join(context) if join else context.transpose(1, 2).flatten(2)
        return F.linear(tokens, proj_weight, proj_bias)

    return attend


def _without_proj(**arguments) -> torch.Tensor:
    D = arguments["z"].shape[-1]
    return _package_attention(**{**arguments, "proj_weight": torch.eye(D), "proj_bias": torch.zeros(D)})


ATTENTION_MISTAKES = {
    "the heads are mixed up on the way out: (B, A, T, d) has to become (B, T, A, d) before the heads are joined.": (
        _wrong_attention(join=lambda context: context.reshape(len(context), context.shape[2], -1))
    ),
    "the heads are mixed up on the way in: split D into (A, d) and then bring A before T; a reshape straight to "
    "(B, A, T, d) mixes tokens.": _wrong_attention(
        split=lambda qkv, heads: (x.reshape(len(x), heads, x.shape[1], -1) for x in qkv.chunk(3, dim=2))
    ),
    "the heads are mixed up on the way in: the first axis of the 3 D numbers is query, key, value, and then come the "
    "heads.": _wrong_attention(
        split=lambda qkv, heads: qkv.unflatten(2, (heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
    ),
    "the heads are mixed up on the way in: the channels of one head stand side by side, (A, d) and not (d, A).": (
        _wrong_attention(
            split=lambda qkv, heads: (x.unflatten(2, (-1, heads)).permute(0, 3, 1, 2) for x in qkv.chunk(3, dim=2))
        )
    ),
    "the scale is that of D, the width of the token; each head's scores are sums of d = D / A products.": (
        _wrong_attention(scale=lambda D, heads: D**-0.5)
    ),
    "the scores are not scaled.": _wrong_attention(scale=lambda D, heads: 1),
    "the scores are multiplied by the square root of d; divide.": _wrong_attention(
        scale=lambda D, heads: (D // heads) ** 0.5
    ),
    "T has to be the second last axis of queries and keys, behind the heads: each head attends over the tokens.": (
        _wrong_attention(
            split=lambda qkv, heads: (x.unflatten(2, (heads, -1)) for x in qkv.chunk(3, dim=2)),
            join=lambda context: context.flatten(2),
        )
    ),
    "proj_weight is multiplied transposed, as F.linear does.": lambda **arguments: _package_attention(
        **{**arguments, "proj_weight": arguments["proj_weight"].T}
    ),
    "qkv_bias is missing.": lambda **arguments: _package_attention(
        **{**arguments, "qkv_bias": torch.zeros_like(arguments["qkv_bias"])}
    ),
    "the scores are divided by d; the paper divides by its square root.": _wrong_attention(
        scale=lambda D, heads: heads / D
    ),
    "the softmax runs over the wrong axis: for each query, the weights of all keys sum to 1.": _wrong_attention(
        axis=-2
    ),
    "the last product is missing, the one with proj_weight (eq. 8).": _without_proj,
}

# 7. Positions for a larger image.


def _resize_cases() -> list[dict]:
    return [
        {"positions": torch.randn(1, 1 + 2 * 3, 4), "old_hw": (2, 3), "new_hw": (4, 6)},
        {"positions": torch.randn(1, 1 + 4 * 4, 6), "old_hw": (4, 4), "new_hw": (6, 5)},
    ]


def _package_positions(positions, old_hw, new_hw) -> torch.Tensor:
    return resize_positions(positions, old_hw, new_hw, "bicubic")


def _resized(
    positions,
    old_hw,
    new_hw,
    transposed: bool = False,
    there: bool = True,
    back: bool = True,
    last: bool = False,
    **flags,
) -> torch.Tensor:
    """Resized with something wrong: the grid transposed, not permuted there or back, the class token's last, flags."""
    cls, patches = positions[:, :1], positions[:, 1:]
    if not there:
        grid = patches.reshape(1, -1, *old_hw)
    elif transposed:
        grid = patches.unflatten(1, old_hw[::-1]).permute(0, 3, 2, 1)
    else:
        grid = patches.unflatten(1, old_hw).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_hw, **{"mode": "bicubic", **flags})
    tokens = grid.permute(0, 2, 3, 1).flatten(1, 2) if back else grid.reshape(1, -1, positions.shape[2])
    return torch.cat([tokens, cls] if last else [cls, tokens], dim=1)


UNPERMUTED = (
    "(1, N, D) has to become (1, h, w, D) and then be permuted to (1, D, h, w); a reshape straight to (1, D, h, w) "
    "mixes channels and places"
)
RESIZE_MISTAKES = {
    f"{UNPERMUTED}.": lambda **arguments: _resized(**arguments, there=False),
    f"{UNPERMUTED}, and so does one back.": lambda **arguments: _resized(**arguments, there=False, back=False),
    "the class token's position comes first, not last.": lambda **arguments: _resized(**arguments, last=True),
    "this is bilinear; the package's default, and the exercise, is bicubic.": lambda **arguments: _resized(
        **arguments, mode="bilinear"
    ),
    "corners are aligned: align_corners=True moves every position.": lambda **arguments: _resized(
        **arguments, align_corners=True
    ),
    "the grid is transposed: N is (h, w), row by row.": lambda **arguments: _resized(**arguments, transposed=True),
    "on the way back (1, D, h, w) has to become (1, h, w, D) before it is flattened to (1, N, D).": (
        lambda **arguments: _resized(**arguments, back=False)
    ),
    "the class token's position has to come first again, unchanged.": lambda **arguments: _resized(**arguments)[:, 1:],
}

# 8. Rollout.


def _rollout_cases() -> list[dict]:
    return [{"maps": torch.randn(3, 2, 4, 5, 5).softmax(-1)}, {"maps": torch.randn(2, 1, 2, 3, 3).softmax(-1)}]


def _wrong_rollout(residual: bool = True, reverse: bool = False, half: bool = True, one: bool = False) -> Callable:
    def rollout(maps: torch.Tensor) -> torch.Tensor:
        eye = torch.ones(maps.shape[-1], maps.shape[-1]) if one else torch.eye(maps.shape[-1])
        result = torch.eye(maps.shape[-1]).expand(maps.shape[1], -1, -1)
        for layer in maps.mean(dim=2):
            layer = (0.5 * layer + 0.5 * eye if half else layer + eye) if residual else layer
            result = result @ layer if reverse else layer @ result
        return result

    return rollout


ROLLOUT_MISTAKES = {
    "the residual connection is missing: each layer is (M + I) / 2, with M the mean over the heads and I the identity, "
    "torch.eye(T).": _wrong_rollout(residual=False),
    "add the identity matrix, torch.eye(T), not the number 1.": _wrong_rollout(one=True),
    "the layers are multiplied in the wrong order: the last one stands on the left.": _wrong_rollout(reverse=True),
    "the rows do not sum to 1: each layer is (M + I) / 2, not M + I.": _wrong_rollout(half=False),
}

EXERCISES = {
    "patchify_without_loops": Exercise(1, _image_cases, _patches, PATCHIFY_MISTAKES),
    "unpatchify": Exercise(2, _unpatchify_cases, _image, UNPATCHIFY_MISTAKES),
    "kernel_of_projection": Exercise(3, _kernel_cases, _projected, KERNEL_MISTAKES, _convolved),
    "add_class_token_and_positions": Exercise(4, _token_cases, _embedded, TOKEN_MISTAKES),
    "attention_of_one_head": Exercise(5, _head_cases, _attended, HEAD_MISTAKES),
    "multi_head_attention": Exercise(6, _attention_cases, _package_attention, ATTENTION_MISTAKES),
    "resize_for_larger_image": Exercise(7, _resize_cases, _package_positions, RESIZE_MISTAKES),
    "rollout": Exercise(8, _rollout_cases, lambda maps: attention_rollout(list(maps)), ROLLOUT_MISTAKES),
}
