"""Fault plans on real processes: what runs inside them, at the edge of their transport (docs/faults.md)."""
