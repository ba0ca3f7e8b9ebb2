"""Open a page where you drop an image and watch the model look at it.

python scripts/demo.py
python scripts/demo.py --model google/vit-base-patch16-224 --examples photos/
python scripts/demo.py --model vit --host 0.0.0.0 --port 8000

The page shows the five likeliest classes, the attention rollout over the
image, each layer's and head's attention, the patches as the model gets them,
and the time taken. It is for this computer only, unless --host says otherwise;
it asks nothing of the network. It needs gradio: pip install -e ".[demo]"
Ctrl-C closes it.

Exit status: 0; 2 if the model or an option is wrong.
"""

import argparse
import contextlib
import functools
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cli

if TYPE_CHECKING:
    from modeling_vit_scratch.evaluation import Predictor

PROGRAM = "demo.py"
EXAMPLES = Path(__file__).parent.parent / "docs" / "images" / "examples"  # test images of CIFAR-10 (JPEG copy)
MAX_UPLOAD = "50mb"
CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
#title h1 { margin-bottom: 0; }
.heading h3 { margin: 0; }
.heading p { margin: 0; font-size: 0.9em; opacity: 0.75; min-height: 3.2em; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
.view { border: none !important; background: none !important; }
.view img { width: 100%; border-radius: 8px; image-rendering: pixelated; }
#took p { font-size: 0.9em; opacity: 0.75; }
@media (max-width: 640px) { /* a phone: less to scroll to the answer and the rollout */
  #title h1 { font-size: 1.3em; }
  #picture { height: 170px !important; }
  #answer .output-class { height: 1.3em; padding: 0; visibility: hidden; } /* the first row says it too */
  #examples .gallery { flex-wrap: nowrap; overflow-x: auto; max-width: calc(100vw - 64px); }
  #examples .gallery-item { flex: none; }
  .heading p { min-height: 0; }
}
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, f"{PROGRAM} [--model MODEL] [--option value ...]")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="MODEL",
        help="folder, Hub id, or file of any model convert.py reads; default: the packaged one of CIFAR-10's classes",
    )
    cli.add_model_options(model)
    cli.add_speed_options(model, maps=True)
    page = parser.add_argument_group("page")
    page.add_argument(
        "--examples", nargs="+", metavar="IMAGE", help="files or folders; default: of CIFAR-10, if of its classes"
    )
    page.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this computer")
    page.add_argument("--port", type=cli.at_least_one, metavar="N", help="default: the first free one from 7860")
    arguments = parser.parse_args(argv)
    if arguments.port is not None and arguments.port > 65535:
        parser.error(f"--port ({arguments.port}) must be at most 65535.")
    return arguments


def import_gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise ValueError('gradio is missing: pip install -e ".[demo]"') from error
    return gradio


def build(predictor: "Predictor", examples: list[str]):
    """The page, a `gradio.Blocks`."""
    from modeling_vit_scratch import plots
    from modeling_vit_scratch.plots.views import SHOWN_SIDE, enlargement, view_image

    gr = import_gradio()
    config = predictor.config
    L, A = config.num_hidden_layers, config.num_attention_heads
    (H, W), (height, width), (h, w) = config.image_hw, config.patch_hw, config.grid_hw
    enlarge, gap = enlargement(config), max(2, SHOWN_SIDE // (24 * max(h, w)))
    # Sliders ask again and again.
    remembered = functools.lru_cache(maxsize=64)(lambda path: view_image(predictor, path))

    def answer(path: str | None, layer: int, head: int):
        if path is None:
            return None, None, None, None, ""
        try:
            found = remembered(path)
        except (ValueError, OSError) as error:
            text = f"This cannot be read as an image: {str(error).replace(path, Path(path).name)}"
            gr.Warning(text, duration=None)
            return None, None, None, None, text  # nothing of an earlier image stays
        model_ms, all_ms = (1000 * part for part in found.seconds)
        return (
            found.answers or None,
            plots.overlay_pixels(found.shown, found.rollout).numpy(),
            overlay(path, layer, head),
            plots.patch_mosaic(found.pixels, config.patch_hw, enlarge, gap).expand(3, -1, -1).permute(1, 2, 0).numpy(),
            f"The model took {model_ms:.0f} ms, all together {all_ms:.0f} ms.",
        )

    def overlay(path: str | None, layer: int, head: int):
        with contextlib.suppress(ValueError, OSError):  # which `answer` has told
            if path is not None:
                found = remembered(path)
                return plots.overlay_pixels(found.shown, found.heads[int(layer) - 1, int(head) - 1]).numpy()
        return None

    def view(name: str, heading: str, text: str):
        gr.Markdown(f"### {heading}\n{text}", elem_classes="heading")
        return gr.Image(
            show_label=False, interactive=False, format="png", buttons=["fullscreen"], elem_id=name, elem_classes="view"
        )

    with gr.Blocks(title="What a Vision Transformer sees", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            f"# What a Vision Transformer sees\n{Path(predictor.name).name}: {predictor.model.num_parameters():,} "
            f"parameters, {L} blocks of {A} heads, images of {W} × {H} pixels in {h * w} patches of {width} × "
            f"{height}.",
            elem_id="title",
        )
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    label="Image", type="filepath", sources=["upload", "clipboard"], height=300, elem_id="picture",
                    placeholder="Drop an image here, paste it,\nor click to pick one",
                )  # fmt: skip
                # gr.Image would open the file itself, and fail without a word where it cannot.
                image.preprocess = lambda upload: upload and upload.path
            with gr.Column():
                label = gr.Label(
                    num_top_classes=5, label="The model says", visible=predictor.can_classify, elem_id="answer"
                )
                took = gr.Markdown(elem_id="took")
        if examples:
            gr.Examples(examples, image, label="Examples", examples_per_page=12, elem_id="examples")
        with gr.Row():
            with gr.Column(min_width=280):
                rollout = view(
                    "rollout", "Attention rollout",
                    "How much of each patch reaches the answer, through all blocks: dark none, bright the most.",
                )  # fmt: skip
            with gr.Column(min_width=280):
                one_head = view("head", "Attention of one head", "Where one head of one block looks; choose it below.")
                layer = gr.Slider(1, max(L, 2), L, step=1, label="Block", elem_id="layer", interactive=L > 1)
                head = gr.Slider(1, max(A, 2), 1, step=1, label="Head", elem_id="which", interactive=A > 1)
            with gr.Column(min_width=280):
                patches = view("patches", "Patches", "The image as the model gets it, read row by row.")
        shown = [label, rollout, one_head, patches, took]
        limit = {"concurrency_limit": os.cpu_count(), "show_progress": "hidden"}
        image.change(answer, [image, layer, head], shown, api_name="classify", **limit)
        for slider in (layer, head):
            slider.change(overlay, [image, layer, head], one_head, api_name=False, trigger_mode="always_last", **limit)
    return page


def serve(arguments: argparse.Namespace, block: bool = True):
    """Start the page; `block` until Ctrl-C. Returns the page."""
    gr = import_gradio()
    import torch

    from modeling_vit_scratch.evaluation.inference import find_images

    try:  # gradio would try a hundred ports
        family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
        socket.create_server((arguments.host, 0), family=family).close()
    except OSError as error:
        raise ValueError(f"--host {arguments.host} is no address of this computer: {error}") from error
    predictor = cli.load_predictor(PROGRAM, arguments, arguments.model)
    config = predictor.config
    # First calls are slow; that of `classify` also drops a copy in float32.
    black = torch.zeros(1, config.num_channels, *config.image_hw, dtype=torch.uint8)
    predictor.classify(black)
    predictor(black, output_attentions=True)
    # Those of other classes than the model's would be misread.
    own = [str(file) for file in sorted(EXAMPLES.glob("*.jpg")) if file.stem in predictor.class_names]
    found = list(find_images(arguments.examples or own))
    for name, wrong in found:
        if wrong:
            raise ValueError(f"--examples {name}: {wrong}.")
    page = build(predictor, [name for name, _ in found])
    page.launch(
        server_name=arguments.host, server_port=arguments.port, share=False, max_file_size=MAX_UPLOAD, quiet=True,
        prevent_thread_lock=True, footer_links=[], ssr_mode=False, css=CSS,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"]),
    )  # fmt: skip
    print(page.local_url, flush=True)
    if block:
        cli.say(PROGRAM, "the page is open; Ctrl-C closes it.")
        page.block_thread()
    return page


def run(arguments: argparse.Namespace) -> int:
    serve(arguments)
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
