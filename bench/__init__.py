"""What canvas-engineering costs, against everyone, in one run. Not part of the wheel; run by ``make bench``."""
