"""Side-by-side comparisons: ``python -m benchmarks`` is the main job, ``--help`` lists the rest."""
