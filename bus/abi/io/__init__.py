"""Xen public headers: io/."""
