"""`domicile-domio`: the driver domain: drives NVMe controllers and serves the block backend, with no privilege but its devices."""
