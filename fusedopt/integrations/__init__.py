"""fusedopt inside other frameworks. None of them is imported unless the user imports it."""
