"""What scripts/benchmark.py measures, a room for each section, each with `measure`, `show` and `draw`.

    measuring  time and memory, measured fairly
    peers      the other libraries, and their models with our weights
    cases      a model and what is done with it: inference or a training step
    model      that, against the peers
    data       the data path, streams, and a look at a whole data set
    streams    photos of a folder, of parquet files and of shards: a part of data
    photos     JPEGs from bytes to normalised floats, beside what a model takes
    trainer    what ImageTrainer adds to a bare training loop
    memory     loading a large model from disk, and training it
    scale      time and memory against images, tokens, depth and processes
    inference  load_for_inference's ways: accuracy against speed
    merging    token merging: accuracy against speed
    race       training: the teaching protocol against our recipe
    speedrun   the record of a track of speedrun/README.md, run again with several seeds

They lie beside the scripts, and not in the package, since the peers are no dependencies of it.
"""

from . import peers  # before transformers, which all others import

__all__ = ["peers"]
