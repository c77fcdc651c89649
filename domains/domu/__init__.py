"""`domicile-domu`: the process of a guest: its vCPUs, and the link to the hypervisor."""
