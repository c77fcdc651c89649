"""The warden: the parent of every process of a machine."""
