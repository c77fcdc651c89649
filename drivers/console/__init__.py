"""The PV console's ring, both ends, without I/O."""
