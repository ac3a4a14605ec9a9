"""One suite for every backend: the same cases, options and tolerances; a backend joins with one entry."""
