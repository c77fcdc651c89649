"""`domicile top`: domains and what they use, live or as text, in the columns of xentop."""
