"""domains/pv"""
