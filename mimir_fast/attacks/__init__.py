"""L-infinity attacks: PGD-MAE on a masked autoencoder, PGD and APGD on any loss, the paper's adaptive attacks."""
