"""Which techniques go together, on which devices and in which way: each cell is run, and recorded with its outcome."""
