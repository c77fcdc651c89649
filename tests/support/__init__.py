"""What tests with real machines share: machines, consoles, looks at the hypervisor's own records, a hostile domain process."""
