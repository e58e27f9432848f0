"""Language models: the seam to them, where their files are, and what runs them."""
