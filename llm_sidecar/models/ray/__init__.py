"""A language model in replicas that Ray Serve runs. Nothing here imports Ray."""
