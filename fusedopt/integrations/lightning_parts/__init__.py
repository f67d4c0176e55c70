"""What is the same for the packages ``lightning`` and ``pytorch_lightning``. Imports neither of them."""
