"""The exercises of the notebook: solutions pass, and a wrong answer is told what is wrong with it."""

import inspect
import math

import checks
import pytest
import solutions
import torch
from torch.nn import functional as F


def told(name: str, answer, capsys) -> str:
    """What the check of an exercise prints for an answer."""
    answer.__name__ = name
    passed = checks.check(answer)
    said = capsys.readouterr().out
    assert passed == ("right" in said.partition(": ")[2][:5]), said
    return said


@pytest.mark.parametrize("name", checks.EXERCISES)
def test_solutions_are_right(name, capsys):
    said = told(name, getattr(solutions, name), capsys)
    assert said.endswith("right, in 2 cases out of 2.\n")


@pytest.mark.parametrize("name", checks.EXERCISES)
def test_each_mistake_gets_its_own_hint(name, capsys):
    """None is right in any case, and none is taken for another."""
    for hint, mistaken in checks.EXERCISES[name].mistakes.items():
        said = told(name, lambda mistaken=mistaken, **arguments: mistaken(**arguments), capsys)
        assert f"Hint: {hint}\n" in said


# Mistakes as somebody might write them.


def patches_by_columns(images, patch):
    B, _, H, W = images.shape
    result = []
    for x in range(0, W, patch):
        for y in range(0, H, patch):
            result.append(images[:, :, y : y + patch, x : x + patch].reshape(B, -1))
    return torch.stack(result, dim=1)


def patches_transposed(images, patch):
    B, C, H, W = images.shape
    squares = images.reshape(B, C, H // patch, patch, W // patch, patch)
    return torch.einsum("bchpwq->bhwcqp", squares).reshape(B, -1, C * patch * patch)


def patches_by_view(images, patch):
    return images.view(images.shape[0], (images.shape[2] // patch) * (images.shape[3] // patch), -1)


def softmax_over_queries(query, key, value):
    return torch.softmax(torch.einsum("bqd,bkd->bqk", query, key) / math.sqrt(query.shape[-1]), dim=1) @ value


def heads(z, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, width=None, joined=None, split=None):
    B, T, D = z.shape
    qkv = F.linear(z, qkv_weight, qkv_bias)
    q, k, v = split(qkv) if split else qkv.view(B, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    out = torch.softmax(q @ k.mT / math.sqrt(width or D // heads), -1) @ v
    return F.linear(joined(out) if joined else out.transpose(1, 2).reshape(B, T, D), proj_weight, proj_bias)


def scaled_by_the_token(z, **arguments):
    return heads(z, **arguments, width=z.shape[-1])


def heads_joined_without_transpose(z, **arguments):
    return heads(z, **arguments, joined=lambda out: out.reshape(z.shape))


def heads_before_three(z, **arguments):
    B, T, D = z.shape
    A = arguments["heads"]
    return heads(z, **arguments, split=lambda qkv: qkv.view(B, T, A, 3, D // A).permute(3, 0, 2, 1, 4))


def grid_transposed(positions, old_hw, new_hw):
    (h, w), D = old_hw, positions.shape[2]
    grid = positions[:, 1:].reshape(1, w, h, D).permute(0, 3, 2, 1)
    grid = F.interpolate(grid, size=new_hw, mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def multiplied(query, key, value):
    return torch.softmax(query @ key.mT * query.shape[-1] ** 0.5, dim=-1) @ value


def grid_by_view(positions, old_hw, new_hw):
    grid = positions[:, 1:].view(1, -1, *old_hw)
    grid = F.interpolate(grid, size=new_hw, mode="bicubic").permute(0, 2, 3, 1)
    return torch.cat([positions[:, :1], grid.reshape(1, -1, positions.shape[2])], dim=1)


def tokens_before_heads(z, **arguments):
    B, T, _ = z.shape
    split = lambda qkv: qkv.view(B, T, 3, arguments["heads"], -1).permute(2, 0, 1, 3, 4)  # noqa: E731
    return heads(z, **arguments, split=split, joined=lambda out: out.reshape(z.shape))


def one_instead_of_identity(maps):
    result = torch.eye(maps.shape[-1]).expand(maps.shape[1], -1, -1)
    for layer in maps:
        result = (layer.mean(1) + 1) / 2 @ result
    return result


@pytest.mark.parametrize(
    ("name", "answer", "hint"),
    [
        ("attention_of_one_head", multiplied, "multiplied by the square root"),
        ("multi_head_attention", tokens_before_heads, "behind the heads"),
        ("resize_for_larger_image", grid_by_view, "mixes channels and places."),
        ("rollout", one_instead_of_identity, "not the number 1"),
        ("patchify_without_loops", patches_by_columns, "run down the columns"),
        ("patchify_without_loops", patches_transposed, "each patch is transposed"),
        ("patchify_without_loops", patches_by_view, "a reshape alone"),
        ("attention_of_one_head", softmax_over_queries, "the softmax runs over the wrong axis"),
        ("multi_head_attention", scaled_by_the_token, "the scale is that of D"),
        ("multi_head_attention", heads_joined_without_transpose, "mixed up on the way out"),
        ("multi_head_attention", heads_before_three, "and then come the heads"),
        ("resize_for_larger_image", grid_transposed, "the grid is transposed"),
    ],
)  # fmt: skip
def test_typical_mistakes(name, answer, hint, capsys):
    said = told(name, answer, capsys)
    assert hint in said.partition("Hint: ")[2], said


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda images, patch: images.flatten(1), ["the shape is (2, 192), and should be (2, 4, 48)", "(2, 3, 8, 8)"]),
        (lambda images, patch: images.cat(), ["it stops with AttributeError"]),
        (lambda images: images, ["it stops with TypeError", "patch"]),
        (lambda images, patch: None, ["it gives None, where a tensor of float32 is wanted"]),
        (lambda images, patch: solutions.patchify_without_loops(images, patch).double(), ["of float32 is wanted"]),
        (lambda images, patch: solutions.patchify_without_loops(images.mul_(1.5), patch), ["writes into its argument"]),
        (lambda images, patch: solutions.patchify_without_loops(images, patch) + 1e-3, ["384 of 384", "[0, 0, 0]"]),
    ],
)  # fmt: skip
def test_what_differs(answer, words, capsys):
    said = told("patchify_without_loops", answer, capsys)
    assert all(word in said for word in words) and "Hint" not in said, said


def test_one_value_off(capsys):
    """It says which."""

    def answer(**arguments):
        result = solutions.rollout(**arguments)
        result[1, 2, 3] += 0.25
        return result

    said = told("rollout", answer, capsys)
    assert "1 of 50 values differ; the first is at [1, 2, 3]" in said


def test_a_kernel_of_another_shape(capsys):
    said = told("kernel_of_projection", lambda weight, patch: weight, capsys)
    assert "the shape is (5, 48), and should be (5, 3, 4, 4)" in said


def test_a_stub_is_not_written_yet_and_an_unknown_name_is_refused(capsys):
    def stub(**arguments):
        raise NotImplementedError

    assert told("rollout", stub, capsys) == "Exercise 8, rollout: yours to write.\n"
    with pytest.raises(ValueError, match="no exercise is called 'test'; there are patchify_without_loops, "):
        told("test", stub, capsys)


def test_numbers_and_signatures():
    assert [exercise.number for exercise in checks.EXERCISES.values()] == [*range(1, 9)]
    for name, exercise in checks.EXERCISES.items():
        names = list(inspect.signature(getattr(solutions, name)).parameters)
        assert all(list(case) == names for case in exercise.cases()), name
