"""What a model sees and has learned: patches, filters, positions, attention, features, reconstructions."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from .analysis import filter_components, patch_sequence, position_similarity, project_features, rotary_scores
from .drawing import (
    BLUE,
    CATEGORIES,
    GREY,
    MARKERS,
    ORANGE,
    SKY,
    as_pixels,
    axis_names,
    caption,
    cut_text,
    draw_legend,
    heat_bar,
    legend_handle,
    new_figure,
    overlay,
    show_image,
    tidy,
)


def plot_patch_sequence(image: torch.Tensor, patch_hw: tuple[int, int], image_title: str = "") -> Figure:
    """An image with its patch grid, and the patches as the sequence that the model reads (ViT, fig. 1; sec. 3.1).

    Args:
        image: (C, H, W), uint8, or floating point in [0, 1].
        patch_hw: Pixels (height, width) of a patch.
        image_title: What stands over the image; empty for its size.
    """
    image = as_pixels(image)
    patches = patch_sequence(image, patch_hw)  # (N, C, patch height, patch width)
    (_, H, W), (height, width), N = image.shape, patch_hw, len(patches)
    h, w = H // height, W // width

    across = min(2 * w, N)
    numbered = N <= 64
    gap = max(1, round(0.08 * width))
    pixel = 6.2 / (across * (width + gap))  # inches
    line = math.ceil(0.2 / pixel) if numbered else gap  # room for the numbers
    down = math.ceil(N / across)
    canvas = torch.ones(image.shape[0], down * (height + line), across * (width + gap) - gap)
    for i, patch in enumerate(patches):
        top, left = i // across * (height + line), i % across * (width + gap)
        canvas[:, top : top + height, left : left + width] = patch

    strip = canvas.shape[1] / canvas.shape[2]
    titles = 0.5 + 0.2 * image_title.count("\n")
    figure = new_figure(9.0, min(max(2.6 * H / W, 6.2 * strip), 6.5) + titles)
    whole, sequence = figure.subplots(1, 2, width_ratios=[2.6, 6.2])
    show_image(whole, image)
    for i in range(1, h):
        whole.axhline(i * height - 0.5, color="white", linewidth=1.0)
    for j in range(1, w):
        whole.axvline(j * width - 0.5, color="white", linewidth=1.0)
    whole.set_title(image_title or f"{H} × {W} pixels", fontsize=10)
    show_image(sequence, canvas)
    if numbered:
        for i in range(N):
            top, left = i // across * (height + line), i % across * (width + gap)
            place = left + width / 2 - 0.5, top + height - 0.5 + line / 2
            sequence.text(*place, f"{i + 1}", ha="center", va="center", fontsize=8 if across <= 16 else 6)
    else:
        for row in range(down):
            place = -gap, row * (height + line) + height / 2
            sequence.text(*place, f"{row * across + 1}", ha="right", va="center", fontsize=7)
    sequence.set_title(f"{N} patches of {height} × {width} pixels, in reading order", fontsize=10)
    return figure


def plot_reconstructions(images: torch.Tensor, mask: torch.Tensor, painted: torch.Tensor) -> Figure:
    """What a masked image model sees and what it paints: images, the same with patches hidden, and these painted.

    What was not hidden is drawn as it is.

    Args:
        images: (n, C, H, W), uint8, or floating point in [0, 1].
        mask: bool (n, h, w), true for each hidden patch.
        painted: (n, C, H, W), floating point in [0, 1].

    Raises:
        ValueError: The shapes do not fit.
    """
    images = torch.stack([as_pixels(image) for image in images])
    if painted.shape != images.shape or len(mask) != len(images):
        raise ValueError(
            f"images {tuple(images.shape)}, painted {tuple(painted.shape)} and mask {tuple(mask.shape)} must be of "
            "the same images."
        )
    hidden = torch.nn.functional.interpolate(mask[:, None].float(), images.shape[2:]) > 0.5  # (n, 1, H, W)
    rows = {
        "image": images,
        "what the model sees": torch.where(hidden, 0.5, images),
        "what it paints": torch.where(hidden, painted.float().clamp(0, 1), images),
    }
    figure = new_figure(min(1.25 * len(images), 12.0) + 0.3, 4.1 * images.shape[2] / images.shape[3] + 0.6)
    panels = figure.subplots(3, len(images), squeeze=False)
    for line, (name, row) in zip(panels, rows.items(), strict=True):
        for axes, image in zip(line, row, strict=True):
            show_image(axes, image)
        line[0].set_title(name, fontsize=10, loc="left")
    return figure


def plot_patch_filters(
    weight: torch.Tensor, patch_hw: tuple[int, int], count: int = 28, title: str = "Patch filters"
) -> Figure:
    """The first principal components of the patch embedding's filters (ViT, fig. 7 left); see `filter_components`.

    Each is drawn on its own scale, 0.5 + 0.5 v / max |v|: grey is 0. Of other than 3 channels the mean is drawn.

    Args:
        weight: Of the patch embedding's projection.
        patch_hw: Pixels (height, width) of a patch.
        count: Number of components.
        title: What the filters are.
    """
    components, share = filter_components(weight, patch_hw, count)
    components = components if components.shape[1] in (1, 3) else components.mean(dim=1, keepdim=True)
    columns = min(7, len(components))
    rows = math.ceil(len(components) / columns)
    figure = new_figure(1.02 * columns + 0.2, 1.2 * rows * patch_hw[0] / patch_hw[1] + 0.7)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for k, axes in enumerate(panels):
        axes.set_axis_off()
        if k < len(components):
            v = components[k]
            show_image(axes, 0.5 + 0.5 * v / v.abs().max().clamp_min(1e-12))
            axes.set_title(f"{k + 1}: {share[k]:.1%}", fontsize=8, pad=2)
    figure.suptitle(
        f"{title}: first {len(components)} principal components\n"
        f"and their share of the variance ({share.sum():.1%} together)",
        fontsize=10,
    )
    return figure


def plot_position_similarity(position_embeddings: torch.Tensor, grid_hw: tuple[int, int], most: int = 16) -> Figure:
    """Each patch's position embedding compared with all others (ViT, fig. 7 centre); see `position_similarity`.

    The tile in row i, column j shows patch (i, j)'s cosine similarity with every patch, in the same arrangement.

    Args:
        position_embeddings: (1, P, D).
        grid_hw: Patches (down, across).
        most: Tiles down and across; of larger or very long grids evenly spaced patches are compared.
    """
    h, w = grid_hw
    similarity = position_similarity(position_embeddings, grid_hw).numpy()
    down, across = min(h, most), min(w, most)
    across = min(across, max(2, 16 * down * h // w))  # at most 16 times as wide as high, 4 times as high as wide
    down = min(down, max(2, 4 * across * w // h))
    rows, columns = (np.linspace(0, n - 1, k).round().astype(int) for n, k in ((h, down), (w, across)))
    cell = math.ceil(24 / min(h, w))  # canvas pixels, so that the gaps can be narrow
    high, wide, gap = h * cell, w * cell, 3 if min(h, w) <= 24 else math.ceil(min(h, w) / 8)
    canvas = np.full((len(rows) * (high + gap) - gap, len(columns) * (wide + gap) - gap), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            tile = similarity[row, column].repeat(cell, axis=0).repeat(cell, axis=1)
            canvas[i * (high + gap) : i * (high + gap) + high, j * (wide + gap) : j * (wide + gap) + wide] = tile

    flat = canvas.shape[1] > 4 * canvas.shape[0]
    scale = (9.0 if flat else 5.2) / max(canvas.shape)  # inches
    width = max(scale * canvas.shape[1] + (0.6 if flat else 1.4), 3.8)
    figure = new_figure(width, scale * canvas.shape[0] + (1.7 if flat else 0.9))
    axes = figure.subplots()
    low = min(0.0, math.floor(4 * similarity.min()) / 4)
    image = axes.imshow(canvas, cmap="cividis", vmin=low, vmax=1, interpolation="nearest")
    side = {"location": "bottom", "shrink": 0.5, "aspect": 40} if flat else {"shrink": 0.9, "aspect": 25, "pad": 0.02}
    bar = figure.colorbar(image, ax=axes, **side)
    bar.set_label("cosine similarity")
    bar.outline.set_visible(False)
    axes.set_xticks([j * (wide + gap) + (wide - 1) / 2 for j in range(len(columns))], columns + 1, fontsize=8)
    axes.set_yticks([i * (high + gap) + (high - 1) / 2 for i in range(len(rows))], rows + 1, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="patch column", ylabel="patch row")
    axes.set_title("Similarity of position embeddings", fontsize=11)
    return figure


def plot_rotary_positions(rotary: torch.nn.Module, grid_hw: tuple[int, int], title: str = "", most: int = 8) -> Figure:
    """What rotary positions do to attention (Su et al., 2021): scores by the offset between patches; `rotary_scores`.

    Some pairs of channels, from fast to slow, and the mean of all of a head's. Where each pair turns by y or by x,
    these are two rows, and the mean is large; where it turns by both, a row is a head.

    Args:
        rotary: A `ViTScratchRotaryPositions`.
        grid_hw: Patches (down, across).
        title: Whose they are, say.
        most: Heads drawn, the first ones, where each turns its own way.
    """
    scores, mixed = rotary_scores(rotary, grid_hw), rotary.frequencies is not None  # (A, d / 2, 2 h - 1, 2 w - 1)
    pairs, periods = scores.shape[1], _periods(rotary, grid_hw)
    if mixed:
        rows = [(head, periods[head].argsort(), f"head {head + 1}") for head in range(min(len(scores), most))]
    else:
        by_y, by_x = torch.arange(pairs).chunk(2)
        rows = [(0, by_y, "pairs turned by y"), (0, by_x, "pairs turned by x")]
    bands = len(rows[0][1])
    chosen = np.unique(np.linspace(0, bands - 1, min(bands, 4)).round().astype(int))
    columns, ratio = len(chosen), min(max(grid_hw[0] / grid_hw[1], 0.7), 1.5)  # of very long grids cells are not square
    figure = new_figure(1.5 * columns + (1.5 if mixed else 3.1) + 1.2, len(rows) * (1.25 * ratio + 0.3) + 1.0)
    layout = figure.add_gridspec(len(rows), columns + 1, width_ratios=[1] * columns + [1 if mixed else 2.2])
    for row, (head, order, name) in enumerate(rows):
        last = row == len(rows) - 1
        for column, pair in enumerate(order[chosen].tolist()):
            axes = figure.add_subplot(layout[row, column])
            period = periods[head, pair].item()
            image = _draw_offsets(axes, scores[head, pair], down=column == 0, across=last)
            axes.set_title(f"a turn in {period:.{1 if period < 10 else 0}f} patches", fontsize=8, pad=3)
            if column == 0:
                axes.set_ylabel(f"{name}\npatches down", fontsize=8)
        if mixed or row == 0:
            axes = figure.add_subplot(layout[row if mixed else slice(None), columns])
            _draw_offsets(axes, scores[head].mean(dim=0), down=not mixed, across=last or not mixed)
            axes.set_title(f"mean of {pairs} pairs", fontsize=8 if mixed else 10, pad=3)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.9, aspect=8 * figure.get_figheight(), pad=0.02)
    bar.set_label("score", fontsize=9)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)
    title = title or "What rotary positions do to attention"
    title += f", {len(rows)} of {len(scores)} heads" if mixed and len(rows) < len(scores) else ""
    figure.suptitle(f"{title}:\nscore of a query (+) and an equal key, by how far away its patch is", fontsize=10)
    return figure


def _periods(rotary: torch.nn.Module, grid_hw: tuple[int, int]) -> torch.Tensor:
    """Patches that each pair of channels needs for a whole turn, along the way that it turns: (heads, d / 2)."""
    places = [rotary.places(side, torch.device("cpu")) for side in grid_hw]
    steps = torch.stack([place.diff().mean().nan_to_num(1.0) for place in places])  # of 1 patch there is no step
    frequencies = rotary.axial().unsqueeze(0) if rotary.frequencies is None else rotary.frequencies.detach().cpu()
    return 2 * torch.pi / (frequencies.float() * steps[:, None]).norm(dim=1).clamp_min(1e-12)


def _draw_offsets(axes, scores: torch.Tensor, down: bool, across: bool):
    """A map over offsets (2 h - 1, 2 w - 1), with the query in the middle; numbers where `down` and `across` say so."""
    y, x = (side // 2 for side in scores.shape)
    edges = (-x - 0.5, x + 0.5, y + 0.5, -y - 0.5)
    image = axes.imshow(
        scores.numpy(), cmap="cividis", vmin=-1, vmax=1, interpolation="nearest", extent=edges, aspect="auto"
    )
    axes.plot(0, 0, marker="+", color="black", markersize=5, markeredgewidth=0.8)
    axes.set_xticks(sorted({-x, 0, x}) if across else [])
    axes.set_yticks(sorted({-y, 0, y}) if down else [])
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("patches across" if across else "", fontsize=8)
    return image


def plot_attention_distance(distances: torch.Tensor, uniform: float | None = None) -> Figure:
    """Mean attention distance of every head by depth (ViT, fig. 7 right); see `attention_distance`.

    Args:
        distances: (L, A) pixels.
        uniform: Distance of attention spread evenly, for comparison.
    """
    distances = torch.as_tensor(distances)
    L, A = distances.shape
    figure = new_figure(5.4, 3.6)
    axes = figure.subplots()
    depth = np.arange(1, L + 1)
    spread = np.linspace(-0.16, 0.16, A) if A > 1 else np.zeros(1)  # heads of equal distance stay apart
    axes.scatter((depth[:, None] + spread).flatten(), distances.flatten(), s=22, color=SKY, edgecolors=BLUE, lw=0.6)
    axes.plot(depth, distances.nanmean(dim=1), color=ORANGE, linewidth=1.5, marker="D", markersize=4)
    handles = [
        Line2D([], [], marker="o", color="none", markerfacecolor=SKY, markeredgecolor=BLUE, label="one head"),
        Line2D([], [], marker="D", markersize=4, color=ORANGE, label=f"mean of {A} heads" if A > 1 else "mean"),
    ]
    if uniform is not None:
        axes.axhline(uniform, color=GREY, linestyle="--", linewidth=1)
        handles.append(legend_handle(GREY, f"even attention: {uniform:.1f}", "--"))
    top = max(np.nanmax(distances.numpy(), initial=0.0), uniform or 0.0)
    axes.set(xlabel="layer", ylabel="mean attention distance (pixels)", xlim=(0.5, L + 0.5), ylim=(0, 1.1 * top or 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_title("How far each head looks", fontsize=11)
    tidy(axes, grid="y")
    draw_legend(figure, handles, loc="outside lower center", ncols=3)
    return figure


def plot_attention_rollout(
    images: Sequence[torch.Tensor],
    maps: torch.Tensor,
    titles: Sequence[str] | None = None,
    image_title: str = "",
) -> Figure:
    """Images, the attention rollout over each, and the image lit by it (ViT, fig. 6 and app. D.7).

    The map is drawn over the image patch by patch, 1 being an even share. In the third column the image is
    multiplied by the map over its largest value, enlarged bilinearly to the image's pixels.

    Args:
        images: n images (C, H, W), uint8, or floating point in [0, 1].
        maps: (n, h, w), `attention_on_grid` of an `attention_rollout`.
        titles: A line for each image, e.g. what the model said.
        image_title: What stands over the column of images; empty for "image".
    """
    n = len(maps)
    if len(images) != n or (titles is not None and len(titles) != n):
        raise ValueError(
            f"there are {len(images)} images for {n} maps and {n if titles is None else len(titles)} titles."
        )
    images = [as_pixels(image) for image in images]
    ratio = max(image.shape[1] / image.shape[2] for image in images)
    figure = new_figure(7.2, n * (2.1 * ratio + (0.3 if titles else 0.05)) + 0.3)
    for row, (axes, image) in enumerate(zip(figure.subplots(n, 3, squeeze=False), images, strict=True)):
        heat = maps[row].detach().float().cpu()
        show_image(axes[0], image)
        heat_bar(figure, overlay(axes[1], image, heat), axes[1])
        large = torch.nn.functional.interpolate(
            heat[None, None], size=image.shape[1:], mode="bilinear", align_corners=False
        )[0]
        show_image(axes[2], image * large / large.max().clamp_min(1e-12))
        if row == 0:
            for panel, title in zip(axes, [image_title or "image", "rollout", "image × rollout"], strict=True):
                panel.set_title(title, fontsize=10)
        if titles is not None:
            # The layout sees a line's height, but not its length: it may run under the next panels.
            caption(axes[0], " ", x=0, ha="left", fontsize=9)
            caption(axes[0], cut_text(titles[row], 90), x=0, ha="left", fontsize=9, in_layout=False)
    return figure


def plot_attention_heads(image: torch.Tensor, maps: torch.Tensor, title: str = "", image_title: str = "") -> Figure:
    """Where each head of a layer looks: its attention over the image, 1 being an even share.

    The colours are those of one range, from 0 to the largest share of all heads, so that heads can be compared.

    Args:
        image: (C, H, W), uint8, or floating point in [0, 1].
        maps: (A, h, w), `attention_on_grid` of a layer's attention maps.
        title: Which layer, say.
        image_title: What stands over the image; empty for "image".
    """
    image = as_pixels(image)
    A, maps = len(maps), maps.detach().float().cpu()
    rows = math.ceil((A + 1) / 5)
    columns = math.ceil((A + 1) / rows)
    figure = new_figure(1.6 * columns + 0.8, rows * (1.45 * image.shape[1] / image.shape[2] + 0.3) + 0.35)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    show_image(panels[0], image)
    panels[0].set_title(image_title or "image", fontsize=9)
    for head, axes in enumerate(panels[1:]):
        if head < A:
            drawn = overlay(axes, image, maps[head], maps.max().item())
            axes.set_title(f"head {head + 1}", fontsize=9)
        else:
            axes.set_axis_off()
    heat_bar(figure, drawn, panels, aspect=16 * rows)
    figure.suptitle(title or "Attention of each head", fontsize=11)
    return figure


def plot_features(
    features: torch.Tensor,
    labels: torch.Tensor,
    class_names: Sequence[str] | None = None,
    most: int = 2000,
    seed: int = 0,
) -> Figure:
    """Features in the plane, by PCA and by t-SNE, in the classes' colours and shapes; see `project_features`.

    Of more than 20 classes the number stands at the class's median; up to 120 are in the legend.

    Args:
        features: (n, D), e.g. `pooler_output`.
        labels: Class indices (n,).
        class_names: One for each class; None for their indices.
        most: Images drawn; of more, so many are chosen at random.
        seed: Of that choice and of t-SNE.
    """
    features, labels = torch.as_tensor(features).detach().float().cpu(), torch.as_tensor(labels).cpu()
    if len(features) != len(labels):
        raise ValueError(f"there are {len(labels)} labels for {len(features)} features.")
    classes = int(labels.max()) + 1 if class_names is None else len(class_names)
    names = axis_names(class_names, classes)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:most].sort().values
    features, labels = features[chosen], labels[chosen]

    many = classes > 20
    longest = max(len(f"{k} {name}" if many else name) for k, name in enumerate(names))
    size = 6 if many else 9
    # A column is the mark, about 5 letters wide with its gaps, and the name; letters are 0.6 of their size wide.
    columns = max(1, min(8 if many else 5, int(9.6 * 72 / (0.6 * size * (longest + 6)))))
    legend = {"ncols": columns, "fontsize": size, "columnspacing": 1 if many else 2}
    figure = new_figure(9.6, 4.5 + (0.13 if many else 0.2) * math.ceil(min(classes, 120) / legend["ncols"]))
    for axes, method in zip(figure.subplots(1, 2), ("pca", "tsne"), strict=True):
        points, share = project_features(features, method, seed)
        for k in labels.unique().tolist():
            x, y = points[labels == k].T
            style = {"color": CATEGORIES[k % len(CATEGORIES)], "marker": MARKERS[k % len(MARKERS)]}
            axes.scatter(
                x,
                y,
                s=10,
                alpha=0.75,
                linewidths=0,
                label=f"{k} {names[k]}" if many else names[k],
                rasterized=True,
                **style,
            )
            if many and method == "tsne":
                text = axes.text(x.median(), y.median(), str(k), fontsize=7, ha="center", va="center")
                text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        axes.set_aspect("equal", adjustable="datalim")
        if method == "pca":
            axes.set(xlabel=f"component 1 ({share[0]:.0%} of the variance)", title="PCA")
            axes.set_ylabel(f"component 2 ({share[1]:.0%} of the variance)")
        else:
            axes.set(xlabel="no unit: only nearness counts", title="t-SNE", xticks=[], yticks=[])
        tidy(axes)
    if classes <= 120:
        handles = figure.axes[0].get_legend_handles_labels()[0]
        draw_legend(figure, handles, loc="outside lower center", markerscale=1.3 if many else 2, **legend)
    figure.suptitle(f"Features of {len(labels):,} images", fontsize=11)
    return figure
