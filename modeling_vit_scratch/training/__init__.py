"""A dataset, a model and a command line become an output folder that is a Hub repository.

    arguments     the options
    recorded      what a run keeps of its options, and which of them resuming may change
    defaults      settings that suit the data, for what nobody named
    run           all of them settled once: folder, data, model, processor, augmentation, trainer
    models        the model of a run: new, or trained before; and its image processor
    schedule      steps of a run, and the learning rate along them
    budget        the number of steps that fit into a time budget, and whether they are compiled
    finetuning    the steps of a run with labels: set up, look, train, measure, report
    pretraining   the same without labels: masked image modelling
    trainer       transformers' Trainer, with what it lacks: exact resuming, averaged weights, shares of a loss
    callbacks     what a run does beside its steps: a clock, signals, noise of its own
    processes     whether several found each other, how they share a model, and what is said when one is lost
    progress      what a run shows while it trains: a bar, and a line for each evaluation
    optimization  Muon, parameter groups, the average of the weights
    checkpoints   whole or invisible; what run they belong to; whether they are damaged
    lora          adapters in each block, by PEFT
    output        the output folder: taken or free, and what a run writes into it
    report        what a run says, writes and draws

`scripts/finetune.py` parses the options and calls `finetune` or `pretrain`.
"""

from .arguments import DataArguments, ImageTrainingArguments, ModelArguments
from .finetuning import finetune
from .pretraining import pretrain
from .trainer import ImageTrainer

__all__ = ["DataArguments", "ImageTrainer", "ImageTrainingArguments", "ModelArguments", "finetune", "pretrain"]
