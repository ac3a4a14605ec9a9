"""What the dispatchers share: which function each connection runs, in which plan, with what weight (NumPy only)."""
