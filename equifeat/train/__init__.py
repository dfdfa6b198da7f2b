"""Training: LightningModule and LightningCLI."""
