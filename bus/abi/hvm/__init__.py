"""Xen public headers: hvm/."""
