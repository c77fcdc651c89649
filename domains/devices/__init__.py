"""Device processes: hardware that has no memory of any domain (docs/decisions/0004-devices.md)."""
