"""The project's own conformance guests (C and assembly) and what builds them."""
