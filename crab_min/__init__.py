"""crab_min: Crab, Crab+, CREMA and PAVE, small enough to read."""
