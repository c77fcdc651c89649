"""Programs for guests that a wheel holds, built (setup.py): `domio.elf`. A checkout builds them from `guests/` instead."""
