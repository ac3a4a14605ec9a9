"""The definition of every result: NumPy only, float64 inside, as plain as the decode loop of a plan."""
