"""The device model of one HVM guest: a process of its own, with rights over that guest alone."""
