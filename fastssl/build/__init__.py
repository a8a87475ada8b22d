"""From a recipe to the objects of a run: the only place that chooses which part does what.

`data` opens images, `run_data` finds those of a run again, `views` the augmentation, `model` the network, `losses` the
loss, `optim` the optimizer and its schedule, `hardware` the device and precision; `preflight` refuses early what cannot
work, `ranks` says who this process is.
"""

from fastssl.build import data, hardware, losses, model, optim, preflight, ranks, run_data, views

__all__ = ["data", "hardware", "losses", "model", "optim", "preflight", "ranks", "run_data", "views"]
