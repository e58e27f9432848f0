"""Language models: their interface, their files, and the processes that run them."""
