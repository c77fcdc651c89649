"""domains/vcpu"""
