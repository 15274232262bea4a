"""A run that is broken off, as by a crash."""


class Breaks(Exception):
    pass


class BreakAt:
    """A training callback that ends the run at an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def on_train_loss_report(self, info):
        if info["iteration"] == self.iteration:
            raise Breaks

    def on_val_loss_report(self, info):
        pass
