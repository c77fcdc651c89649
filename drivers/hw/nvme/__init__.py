"""NVM Express 1.4: the controller as a device, and what it shares with its driver (`spec`)."""
