"""fusedopt inside other frameworks. Nothing here is imported unless the user does."""
