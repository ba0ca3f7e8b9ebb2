"""The data path, from bytes in memory to normalised floats; streams; and a look at a whole data set."""

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from PIL import Image

from modeling_vit_scratch import plots
from modeling_vit_scratch.data import Augmentation, inspect_splits, load_splits
from modeling_vit_scratch.data.doctor import fingerprint
from modeling_vit_scratch.data.sources import DIGITS
from modeling_vit_scratch.data.splits import DecodedImages, as_batch
from modeling_vit_scratch.evaluation.tables import text_table
from modeling_vit_scratch.training.models import make_processor

from . import peers, streams
from .cases import SHOWCASE, Case, make_model, make_step
from .measuring import OURS, compare, faster, interleave, number, one_thread, ratio, share, stopwatch, under_titles

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
DATA_BATCH = 256
DATA_CASES = {
    "crop, flip, normalise": {},
    "... and RandAugment": {"rand_augment_ops": 2, "rand_augment_magnitude": 5.0},
    "... and mixup": {"mixup_alpha": 1.0, "num_labels": 10},
}


def random_images(count: int, device: torch.device) -> DecodedImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return DecodedImages(images.to(device), torch.randint(10, (count,), generator=generator).to(device))


def batches(count: int, size: int):
    """Endless batches of indices, as a data loader hands them out."""
    while True:
        order = torch.randperm(count)
        yield from (order[start : start + size].tolist() for start in range(0, count - size + 1, size))


def our_data_path(dataset: DecodedImages, settings: dict) -> Callable[[], object]:
    augmentation = Augmentation(MEAN, STD, crop_padding=4, horizontal_flip=0.5, **settings)
    indices, steps = batches(len(dataset), DATA_BATCH), itertools.count()

    def step():
        batch = as_batch(dataset.__getitems__(next(indices)))
        return augmentation.with_labels(batch["pixel_values"], batch["labels"], next(steps), 0)

    return step


def torchvision_data_path(dataset: DecodedImages, settings: dict) -> Callable[[], object]:
    """The same with torchvision: image by image, as its users write it; magnitude 15 of 30 is ours of 5 of 10."""
    transforms = peers.MODULES["torchvision"].transforms
    augment = [transforms.RandAugment(settings["rand_augment_ops"], 15)] if "rand_augment_ops" in settings else []
    each = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            *augment,
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    from torchvision.transforms import v2

    mixup = v2.MixUp(num_classes=10) if "mixup_alpha" in settings else None
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in dataset.images.cpu()]
    labels, indices = dataset.labels.cpu(), batches(len(dataset), DATA_BATCH)

    def step():
        index = next(indices)
        batch = torch.stack([each(images[i]) for i in index]), labels[index]
        return batch if mixup is None else mixup(*batch)

    return step


def measure(args: argparse.Namespace) -> dict:
    """Batches from bytes in memory to normalised floats, on one core or on the GPU; the share of a training step."""
    dataset = random_images(4 * DATA_BATCH, args.device)
    on_gpu = args.device.type == "cuda"
    case = Case("", "showcase", DATA_BATCH, training=True, bf16=on_gpu, compiled=on_gpu)
    rows = []
    with one_thread():
        train = stopwatch(make_step(case, make_model(case, OURS), args.device), args.device, args.least)
        for title, settings in DATA_CASES.items():
            contestants = {OURS: stopwatch(our_data_path(dataset, settings), args.device, args.least)}
            if "torchvision" in peers.MODULES:
                step = torchvision_data_path(dataset, settings)
                contestants["torchvision"] = stopwatch(step, torch.device("cpu"), args.least)
            samples = interleave({**contestants, "step": train}, args.rounds, title)
            for name, row in compare({name: samples[name] for name in contestants}).items():
                row |= {"images_per_second": DATA_BATCH / row["seconds"]}
                row |= {"share_of_step": 1 / (1 + faster(samples, name, "step"))}
                rows.append({"case": title, "name": name, **row})
        inspection = measure_inspection(args.dataset_name or DIGITS)
    return {"rows": rows, "streams": streams.measure(args), "inspection": inspection}


def measure_inspection(dataset_name: str) -> dict:
    """Seconds that a run's look at its data takes: a fingerprint at every start, all else in a dry run."""
    splits = load_splits(dataset_name, make_processor(SHOWCASE.config))
    seconds = []
    for look in (fingerprint, inspect_splits):
        start = time.perf_counter()
        look(splits)
        seconds.append(time.perf_counter() - start)
    images = len(splits.train) + len(splits.validation) + len(splits.test)
    return {"dataset": dataset_name, "images": images, "fingerprint_seconds": seconds[0], "seconds": seconds[1]}


def show(result: dict) -> str:
    def cells(row: dict) -> list[str]:
        theirs = "" if row["name"] == OURS else ratio(row["ours_is"])
        speed = [number(row["images_per_second"]), f"{row['spread']:.0%}"]
        return [row["name"], *speed, theirs, share(row["share_of_step"])]

    lines = under_titles(result["rows"], cells)
    text = f"{DATA_BATCH} images of 32 x 32; one core, or the GPU if it is the device\n" + text_table(
        [["", "images/s", "spread", "ours is", "of a training step"], *lines]
    )
    look = result["inspection"]
    return f"{text}\n\n{streams.show(result['streams'])}" + (
        f"\n\n{look['dataset']}, {look['images']:,} images: fingerprint {number(look['fingerprint_seconds'])} s, "
        f"inspection {number(look['seconds'])} s"
    )


def draw(result: dict) -> Figure:
    groups = {row["case"]: {} for row in result["rows"]}
    for row in result["rows"]:
        groups[row["case"]][row["name"]] = row["images_per_second"], f"{row['images_per_second']:,.0f}"
    return plots.plot_bars(groups, "images per second")
