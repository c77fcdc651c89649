"""hypervisor/core"""
