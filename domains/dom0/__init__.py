"""domains/dom0"""
