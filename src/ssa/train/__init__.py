"""Training: the loop, its optimizer, stream draws, checkpoints and metrics. `ssa.train.trainer.train` is the entry."""
