"""fusedopt inside other frameworks. Nothing here imports one of them unless the user does."""
