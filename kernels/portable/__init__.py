"""Attention from the frameworks' own operations, for every device that has no kernel here; fast on CPUs."""
