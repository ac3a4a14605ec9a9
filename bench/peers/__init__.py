"""Everyone who is measured; each peer in a module of its own, optional, and absent with a reason."""
