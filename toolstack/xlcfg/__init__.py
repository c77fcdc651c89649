"""xl.cfg(5): the grammar (`grammar`), its keys (`keys`), disk and network strings (`devices`), and what they mean (`model`)."""
