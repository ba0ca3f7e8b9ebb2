"""draw_figures, called from Python: what each kind gives, whose models it takes, and what it refuses."""

import pytest
import torch
from drawings import draw, noise_image, overlaps, small_config, write_history
from matplotlib.figure import Figure
from PIL import Image
from transformers import ViTImageProcessorPil

from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.data import load_split
from modeling_vit_scratch.evaluation import Predictor
from modeling_vit_scratch.plots import attention_on_grid, attention_rollout, draw_figures
from modeling_vit_scratch.plots.figures import KINDS, NEED_IMAGES, NEED_LABELS
from modeling_vit_scratch.plots.views import ModelView, view_image


def save(folder, **fields):
    torch.manual_seed(0)
    model = ViTScratchForImageClassification(small_config(image_size=(16, 8), **fields))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("digits"), id2label={i: str(i) for i in range(10)})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        opened(i).save(folder / f"{i}.png")
    return folder


def opened(seed: int) -> Image.Image:
    return Image.fromarray(noise_image(3, 30, 20, seed).permute(1, 2, 0).numpy())


def test_figures_of_images(folder, photos):
    kinds = [kind for kind in KINDS if kind in {"filters", "positions"} | NEED_IMAGES]
    figures = draw_figures(folder, kinds, [photos / "0.png", str(photos / "[12].png")], layer=1)
    numbered = [f"{name}_{i}" for name in ("patch_sequence", "attention_heads") for i in (1, 2, 3)]
    others = ["patch_filters", "position_similarity", "attention_rollout", "attention_distance"]
    assert set(figures) == {*numbered, *others}
    assert all(isinstance(draw(figure), Figure) for figure in figures.values())
    assert figures["attention_heads_2"].get_suptitle().startswith("Attention of each head, layer 1 of 2")
    assert set(draw_figures(folder, "heads", photos, max_images=2)) == {"attention_heads_1", "attention_heads_2"}


def test_a_photo_of_another_ratio_is_titled_as_what_the_model_gets(folder):
    for width, height, title in ((40, 20, "as the model sees it\n(16 × 8)"), (10, 20, "image"), (99, 200, "image")):
        photo = Image.new("RGB", (width, height))
        figures = draw_figures(folder, ["heads", "rollout", "patches"], [photo, photo.resize((8, 16))])
        first = [figures[name].axes[0].get_title() for name in ("attention_heads_1", "attention_rollout")]
        assert first == [title, title]
        assert figures["attention_heads_2"].axes[0].get_title() == "image"
        whole = figures["patch_sequence_1"].axes[0].get_title()
        assert whole == (title if width > height else "16 × 8 pixels")
        for figure in figures.values():
            assert not overlaps([axes.title for axes in draw(figure).axes])
            assert all(axes.title.get_window_extent().y1 < figure.bbox.height + 3 for axes in figure.axes)


def test_files_and_opened_images_give_the_same_figure(folder, photos):
    of_file, of_image = (
        draw_figures(Predictor(folder, "cpu"), "rollout", image)["attention_rollout"]
        for image in (photos / "1.png", opened(1))
    )
    for axes, others in zip(of_file.axes, of_image.axes, strict=True):
        for image, other in zip(axes.images, others.images, strict=True):
            assert (image.get_array() == other.get_array()).all()
    titles = [figure.axes[0].texts[-1].get_text() for figure in (of_file, of_image)]
    assert [title.partition(": the model says ")[0] for title in titles] == ["1.png", "image 1"]


def test_figures_of_a_split(folder):
    kinds = [kind for kind in KINDS if kind in {"confusion", "per-class", "rollout"} | NEED_LABELS]
    named = draw_figures(folder, kinds, dataset="digits", split="test", max_samples=40)
    assert set(named) == {KINDS[kind] for kind in kinds}
    predictor = Predictor(folder, "cpu")
    split = load_split("digits", "test", max_samples=40, image_size=predictor.image_hw, models=[predictor])
    loaded = draw_figures(predictor, ["confusion", "mistakes"], dataset=split, count=3)
    cells = [figure["confusion_matrix"].axes[0].images[0].get_array() for figure in (named, loaded)]
    assert (cells[0] == cells[1]).all()
    assert len(loaded["mistakes"].axes) == 3


def test_the_seed_of_the_cut_is_another_than_that_of_the_features(folder):
    settings = {"dataset": "digits", "split": "validation", "train_val_split": 0.03}

    def points(**seeds):
        figure = draw_figures(folder, "features", **settings, **seeds)["features"]
        return [points.get_offsets().data.tolist() for points in figure.axes[0].collections]  # by PCA

    assert points(seed=1) == points(seed=1, features_seed=2) != points(seed=2)


def test_curves_of_several_runs_need_no_model(tmp_path):
    runs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        runs.append(write_history(tmp_path / name).parent)
    assert list(draw_figures(runs[0], "curves")) == ["training_curves"]
    figure = draw(draw_figures(runs, ["curves"])["training_curves"])
    labels = [text.get_text().partition(":")[0] for text in figure.legends[0].get_texts()]
    assert labels == ["first/run", "second/run"]


def test_bad_input_is_named_in_a_line(folder, photos, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    predictor = Predictor(folder, "cpu")
    split = load_split("digits", max_samples=20, models=[predictor])
    encoder = ViTScratchForImageClassification.from_pretrained(folder)
    encoder.vit.save_pretrained(tmp_path / "encoder")
    ViTImageProcessorPil.from_pretrained(folder).save_pretrained(tmp_path / "encoder")
    for words, options, message in (
        ((folder, "rolout"), {}, "'rolout' is no KIND; known are filters, positions"),
        ((folder, ["filters", "rollout"]), {}, "rollout needs images, or a dataset"),
        ((folder, "features", photos), {}, "features needs a labelled dataset"),
        (([folder, folder], "filters"), {}, "there are 2 models; only curves take more than one"),
        (([], "curves"), {}, "there are 0 models"),
        (([folder, folder], "curves"), {}, "the same run is named twice"),
        ((folder, "confusion"), {}, "no metrics.json with a confusion matrix"),
        ((predictor, "rollout", photos, split), {}, "name images or a dataset, not both"),
        ((predictor, "rollout", [photos / "0.png", tmp_path / "broken.png"]), {}, "broken.png: unreadable image"),
        ((predictor, "rollout", tmp_path / "none.png"), {}, "none.png: there is no such file"),
        ((predictor, "heads", photos), {"layer": 3}, "--layer (3) must be 1 to 2"),
        ((predictor, "heads", photos), {"max_images": 0}, "max_images (0) must be at least 1"),
        ((predictor, "mistakes", [], "digits"), {"count": 0}, "count (0) must be at least 1"),
        ((predictor, "features", [], "digits", "dev"), {}, "no split 'dev'"),
        ((tmp_path / "encoder", "reliability", [], split), {}, "no trained classifier"),
        ((tmp_path / "nothing" / "there" / "x", "filters"), {}, "there is no file or folder"),
    ):
        with pytest.raises(ValueError) as error:
            draw_figures(*words, **options)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_view_leaves_out_what_cannot_be_read_and_says_so(folder, photos, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    said = []
    view = ModelView(
        Predictor(folder, "cpu"),
        [tmp_path / "broken.png", photos / "0.png", tmp_path / "none.png"],
        on_unreadable=lambda name, wrong: said.append((name, wrong)),
    )
    assert view.titles == ["0.png"] and len(view.pixels) == 1 and view.pixels[0].shape == (3, 16, 8)
    assert [name for name, _ in said] == [str(tmp_path / "broken.png"), str(tmp_path / "none.png")]
    assert said[1][1] == "there is no such file"


@pytest.mark.parametrize("fields", [{"pooling": "cls", "num_register_tokens": 2}, {"pooling": "mean"}])
def test_one_image_viewed(fields, photos, tmp_path):
    predictor = Predictor(save(tmp_path, **fields), "cpu")
    view = view_image(predictor, photos / "2.png", top_k=3)
    probabilities = predictor.probabilities(predictor(view.pixels[None]).logits)[0]
    assert list(view.answers.values()) == pytest.approx(probabilities.topk(3).values.tolist(), abs=1e-5)
    config = predictor.config
    with torch.no_grad():
        maps = predictor(view.pixels[None], output_attentions=True).attentions
    geometry = config.grid_hw, config.num_prefix_tokens, config.pooling
    torch.testing.assert_close(view.rollout, attention_on_grid(attention_rollout(maps), *geometry)[0])
    assert view.heads.shape == (2, 3, *config.grid_hw) and view.shown.shape == (3, 16 * 28, 8 * 28)
