"""Plain PyTorch: any device, any floating dtype, the oracle of every test. Modules here never import one another."""
