"""domains/domio"""
