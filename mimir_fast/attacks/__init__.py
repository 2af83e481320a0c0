"""L-infinity attacks: PGD-MAE on masked autoencoders, PGD and Auto-PGD on any loss, the paper's adaptive attacks."""
