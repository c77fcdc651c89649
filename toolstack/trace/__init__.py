"""Looking into a running machine: records of all its processes, joined to requests and to a timeline."""
