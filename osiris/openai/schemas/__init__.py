"""Request and response models of the paths under `/v1`."""
