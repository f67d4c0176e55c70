"""Coverage-guided fuzzing with atheris: ``python -m fuzz TARGET`` in this folder's parent."""
