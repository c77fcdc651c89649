"""`domicile-netio`: the driver domain of the network: serves the network back end, and bridges guests and tests in software."""
