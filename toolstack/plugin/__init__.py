"""pytest plugin (entry point `domicile`): boot guests in tests and talk to their consoles. Guide: docs/testing-your-guest.md."""
