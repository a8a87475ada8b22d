"""From a recipe to the objects of a run: the only place that chooses which part does what.

`data` opens images, `run_data` finds those of a run again, `views` the augmentation, `model` the network, `losses` the
loss, `optim` the optimizer and its schedule, `hardware` the device and precision; `preflight` refuses early what cannot
work, `checks` what the images or ranks cannot do, `idle` names settings without effect, `ranks` says who this process
is.
"""

from fastssl.build import checks, data, hardware, idle, losses, model, optim, preflight, ranks, run_data, views

__all__ = ["checks", "data", "hardware", "idle", "losses", "model", "optim", "preflight", "ranks", "run_data", "views"]
