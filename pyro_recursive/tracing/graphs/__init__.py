"""A run of a program as a graph of ATen operators: draws, values read in Python, machine code."""
